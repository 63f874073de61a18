#!/bin/bash
# Submits an attack as a heterogeneous job: a component for the policy and one for each reward model's server.
#
#   slurm/submit_attack.sh RM_CHECKPOINT RM_CHECKPOINT... -- run_dir=DIR SETTING...
#
# Nodes: ADVRM_NODES_ATTACK for the policy, ADVRM_NODES_SERVE for each server. Settings of the servers (model, parallel):
# ADVRM_SERVE_SETTINGS, with spaces. Further options of sbatch, for every component: ADVRM_SBATCH.
set -euo pipefail

scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export ADVRM_HOME=${ADVRM_HOME:-$(dirname "$scripts")}
source "$scripts/common.sh"
load_site

members=()
while (($#)) && [[ $1 != -- ]]; do members+=("$1"); shift; done
((${#members[@]} >= 2 && $# > 1)) || fail "usage: slurm/submit_attack.sh RM RM... -- run_dir=DIR SETTING..."
shift
read -r -a more <<<"${ADVRM_SBATCH:-}"
components=(--nodes="${ADVRM_NODES_ATTACK:-1}" "${more[@]}")
for _ in "${members[@]}"; do
    components+=(: --exclusive --requeue --nodes="${ADVRM_NODES_SERVE:-1}" "${more[@]}")
done
ADVRM_MEMBERS="${members[*]}" sbatch "${components[@]}" "$scripts/attack.sbatch" "$@"
