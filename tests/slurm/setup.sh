#!/bin/bash
# Installs SLURM and munge from Debian's archive for tests/slurm; called by make test-slurm, as root only.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
if command -v slurmctld slurmd munged >/dev/null; then
    exit 0
fi
if [[ $EUID != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "slurm-wlm and munge are not installed, and only root can install them: the tests of tests/slurm are skipped"
    exit 0
fi
echo "installing slurm-wlm and munge"
export DEBIAN_FRONTEND=noninteractive
# the daemons of the packages are not wanted: the tests start their own
printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d.advrm
chmod +x /usr/sbin/policy-rc.d.advrm
[[ -e /usr/sbin/policy-rc.d ]] || { ln -s policy-rc.d.advrm /usr/sbin/policy-rc.d; linked=1; }
trap '[[ -z ${linked:-} ]] || rm -f /usr/sbin/policy-rc.d; rm -f /usr/sbin/policy-rc.d.advrm' EXIT
timeout 300 apt-get install -y -q --no-install-recommends slurm-wlm munge >/dev/null \
    || { timeout 120 apt-get update -q >/dev/null; timeout 300 apt-get install -y -q --no-install-recommends slurm-wlm munge >/dev/null; }
