#!/usr/bin/env bash
# Makes the folder that run.sh installs on a GPU machine without a package index:
#
#     benchmarks/gpu/bundle.sh DEST [TE_FOLDER] [PYTHON]
#
# DEST/whl gets the wheels of bundle.txt for Python 3.12 on x86-64. TE_FOLDER holds a built Transformer Engine:
# te_site.tar.xz (its core library) and transformer_engine_torch-*.whl (compiled against the machine's torch). Without it
# the FP8 rows of the table are skipped. Ends with 1 if all of it is more than 64 MiB. PYTHON only needs pip.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dest=$1 engine=${2:-} python=${3:-python3}
mkdir -p "$dest/whl"
"$python" -m pip --disable-pip-version-check download -q --no-deps --only-binary=:all: --python-version 3.12 \
  --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 \
  --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$dest/whl" -r "$here/bundle.txt"
# it has no wheel of its own
"$python" -m pip --disable-pip-version-check wheel -q --no-deps -w "$dest/whl" antlr4-python3-runtime==4.9.3
if [ -n "$engine" ]; then
  mkdir -p "$dest/te"
  cp "$engine"/te_site.tar.xz "$engine"/transformer_engine_torch-*.whl "$dest/te/"
fi
size=$(du -sm "$dest" | cut -f1)
echo "$dest: $size MiB"
[ "$size" -le 64 ]
