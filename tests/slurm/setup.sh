#!/bin/bash
# Installs SLURM and munge from Debian's archive for tests/slurm; called by make test-slurm, as root only. Where that
# cannot be done it says why in one line, and the tests are skipped.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin DEBIAN_FRONTEND=noninteractive
readonly PACKAGES=(slurm-wlm munge curl) # curl: the scripts ask servers with it whether they are ready
present() {
    local program
    for program in slurmctld slurmd sbatch munged curl; do command -v "$program" >/dev/null || return; done
}

if present; then
    exit 0
fi
if [[ $EUID != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "${PACKAGES[*]} are not all installed, and only root can install them, by apt: tests of tests/slurm are skipped"
    exit 0
fi
echo "installing ${PACKAGES[*]}"
# the daemons of the packages are not wanted: the tests start their own
readonly POLICY=/usr/sbin/policy-rc.d
log=$(mktemp)
trap 'rm -f "$log"; [[ -z ${own_policy:-} ]] || rm -f "$POLICY"' EXIT
if [[ ! -e $POLICY ]]; then
    own_policy=1
    printf '#!/bin/sh\nexit 101\n' >"$POLICY"
    chmod +x "$POLICY"
fi

# another apt may be at work: wait for it, but not for ever
apt() {
    timeout 300 apt-get -q -o DPkg::Lock::Timeout=120 -o Acquire::http::Timeout=30 -o Acquire::Retries=1 "$@" >"$log" 2>&1
}

install() { apt install -y --no-install-recommends "${PACKAGES[@]}"; }

install || { apt update && install; } || {
    reason=$(grep -m 1 '^E: ' "$log" || tail -n 1 "$log")
    echo "apt could not install ${PACKAGES[*]} (${reason:-no answer within 300 s}): tests of tests/slurm are skipped"
}
