#!/usr/bin/env bash
# Installs a bundle (bundle.sh) beside the machine's own packages, and runs run.py with the arguments that follow it:
#
#     benchmarks/gpu/run.sh BUNDLE --only fp8 offload
#
# BUNDLE is a folder, or - where everything is installed. Results go to $OUT (default: gpu_results).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
bundle=$1
shift
site=${ADVRM_GPU_SITE:-/tmp/advrm_gpu}
export PYTHONUNBUFFERED=1 PYTHONPYCACHEPREFIX=$site/pyc PYTHONPATH="$here/../..${PYTHONPATH:+:$PYTHONPATH}"
[ -d /usr/local/cuda/include ] && export NVTE_CUDA_INCLUDE_DIR=/usr/local/cuda/include

add() { # target, wheels: they go before the machine's own
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$@"
}

if [ "$bundle" != - ]; then
  if [ ! -e "$site/installed" ]; then
    mkdir -p "$site/packages" "$site/engine"
    add "$site/packages" "$bundle"/whl/*.whl
    if [ -d "$bundle/te" ]; then
      tar -xJf "$bundle/te/te_site.tar.xz" -C "$site/engine"
      add "$site/extension" "$bundle"/te/transformer_engine_torch-*.whl
      cp -r "$site/extension/." "$site/engine/" # both are parts of one package
    fi
    touch "$site/installed"
  fi
  export PYTHONPATH="$site/engine:$site/packages:$PYTHONPATH"
fi
exec python3 "$here/run.py" --out "${OUT:-gpu_results}" "$@"
