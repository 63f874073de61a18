#!/bin/bash
# Submits every stage of a pipeline that is not complete as a job of its own, each after those it needs.
#
#   slurm/submit_pipeline.sh run_dir=DIR SETTING...
#
# Run it again at any time: complete stages are not submitted again, waiting and running ones are not doubled, failed ones
# are submitted anew. Nodes of each kind of stage: ADVRM_NODES_SFT, _TRAIN_RM, _ATTACK, _RLHF, _REFERENCE, _PREFERENCES,
# _SAMPLES, _BEST_OF_N, _ROOM (ADVRM_NODES for all of them; join, select, random and report take one process). Further
# options of sbatch: ADVRM_SBATCH. Where jobs run in a container, ADVRM_LOGIN_COMMAND names a nemo-advrm that runs here; it
# only lists the stages.
set -euo pipefail

scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export ADVRM_HOME=${ADVRM_HOME:-$(dirname "$scripts")}
source "$scripts/common.sh"
load_site
find_command

run_dir=
for setting in "$@"; do
    [[ $setting != run_dir=* ]] || run_dir=${setting#run_dir=}
done
[[ -n $run_dir ]] || fail "name the run directory: slurm/submit_pipeline.sh run_dir=DIR SETTING..."
mkdir -p "$run_dir/slurm"
run_dir=$(cd "$run_dir" && pwd)
# the jobs of this directory are known by their names, whoever lost track of their numbers
prefix=advrm.$(printf %s "$run_dir" | cksum | cut -d ' ' -f 1)

exec 9>"$run_dir/slurm/lock"
flock --wait 60 9 || fail "another submit_pipeline.sh has been at work on $run_dir for a minute"

stages=$("${ADVRM_LOGIN_COMMAND:-$command}" stages "$@" run_dir="$run_dir") # a wrong setting ends here, before anything is submitted
alive=$(squeue --noheader --me --format='%j %A' --states=PENDING,RUNNING,SUSPENDED,CONFIGURING,COMPLETING,REQUEUED)
read -r -a more <<<"${ADVRM_SBATCH:-}"

declare -A job_of complete
while IFS=$'\t' read -r stage kind status after; do
    if [[ $status != todo ]]; then
        complete[$stage]=1
        echo "$stage: $status"
        continue
    fi
    name=$prefix.${stage//\//.}
    job=$(awk -v name="$name" '$1 == name { print $2; exit }' <<<"$alive")
    if [[ -n $job ]]; then
        echo "$stage: job $job is there already"
    else
        options=(--parsable --job-name="$name" --output="$run_dir/slurm/${stage//\//.}-%j.log" --kill-on-invalid-dep=yes)
        nodes=ADVRM_NODES_${kind^^}
        options+=(--nodes="${!nodes:-${ADVRM_NODES:-1}}")
        needed=()
        if [[ $after != - ]]; then
            IFS=, read -r -a before <<<"$after"
            for one in "${before[@]}"; do
                [[ -n ${complete[$one]:-} ]] || needed+=("${job_of[$one]}")
            done
        fi
        ((${#needed[@]} == 0)) || options+=(--dependency="afterok:$(IFS=:; echo "${needed[*]}")")
        tasks=${ADVRM_TASKS_PER_NODE:-}
        if [[ $kind =~ ^(join|select|random|report)$ ]]; then
            options+=(--nodes=1)
            tasks=1
        fi
        job=$(ADVRM_TASKS_PER_NODE=$tasks sbatch "${options[@]}" "${more[@]}" "$scripts/pipeline.sbatch" \
            "$@" run_dir="$run_dir" pipeline.only="$stage" 9>&-)
        job=${job%%;*} # a federation adds the cluster's name
        printf '%s\t%s\t%s\n' "$stage" "$job" "$(date --iso-8601=seconds)" >>"$run_dir/slurm/jobs.tsv"
        echo "$stage: submitted job $job${needed[*]:+ after ${needed[*]}}"
    fi
    job_of[$stage]=$job
done <<<"$stages"
