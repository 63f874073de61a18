#!/usr/bin/env bash
# Installs nemo_advrm over a Python that has NVIDIA's builds of PyTorch, Transformer Engine, Apex and Megatron-Core:
# an image's, or a cluster's module. These stay as they are.
#
#   docker/install.sh WHEEL FOLDER [EXTRA...]        docker/install.sh dist/nemo_advrm-*.whl /opt/nemo_advrm serve
#
# FOLDER becomes a virtual environment that sees the packages of that Python (PYTHON, default python3) and holds what they
# lack. Packages of GPU code are kept whatever their version; others are installed anew if nemo_advrm asks for a newer one.
# ALSO_KEEP="pydantic protobuf" names more to keep, ALSO_KEEP="*" all: pip then fails if one does not fit.
#
# Rejected: pip install into the image's own environment, where pip removes what it upgrades, and cannot upgrade what
# Debian installed; the image's constraints (PIP_CONSTRAINT), which also hold what nemo_advrm needs newer.
set -euo pipefail

if (($# < 2)); then
    echo "usage: install.sh WHEEL FOLDER [EXTRA...]" >&2
    exit 2
fi
wheel=$1 folder=$2
shift 2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$(command -v "${PYTHON:-python3}") || { echo "error: no ${PYTHON:-python3} on the path: name one in PYTHON" >&2; exit 2; }
[[ -f $wheel ]] || { echo "error: no wheel $wheel" >&2; exit 2; }
[[ ! -e $folder ]] || { echo "error: $folder exists" >&2; exit 2; }
unset PIP_CONSTRAINT

plan=$(mktemp -d)
installed=
# A half-made environment does not look like one, so none is left, by an interrupt either.
end() {
    rm -rf "$plan"
    if [[ ! $installed ]]; then
        rm -rf "$folder"
        echo "error: nemo_advrm was not installed; nothing of the image was changed" >&2
    fi
}
trap end EXIT

"$python" "$here/kept_packages.py" plan "$plan" "$wheel" "$@"
# Without pip: Debian's Python has none for new environments, and the image's own installs into any. NeMo's image keeps
# its packages in a virtual environment, which is no system for another one: its folder is named in a .pth file.
"$python" - "$folder" <<'END'
import sys, sysconfig, venv
from pathlib import Path

folder, prefix = sys.argv[1], Path(sys.prefix)
nested = sys.prefix != sys.base_prefix
system = not nested or "include-system-site-packages = true" in (prefix / "pyvenv.cfg").read_text().lower()
venv.create(folder, system_site_packages=system, symlinks=True)
if nested:
    image = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    own = Path(sysconfig.get_path("purelib", vars={"base": folder}))
    (own / "image.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in image))
END
pip=("$python" -m pip --python "$folder/bin/python" install --no-cache-dir --disable-pip-version-check)
"${pip[@]}" --constraint "$plan/constraints.txt" --requirement "$plan/requirements.txt"
"${pip[@]}" --no-deps "$wheel"
"$folder/bin/python" "$here/kept_packages.py" check "$plan"
installed=yes
echo "installed: $folder/bin/nemo-advrm"
