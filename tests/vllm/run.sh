#!/usr/bin/env bash
# All tests of the vLLM engine, in the environment that toolkits/vllm/install_cpu.sh makes, made first if it is missing; arguments
# are pytest's. About 10 minutes on 2 cores. VLLM_VENV: another place than .venv-vllm.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)"
venv="${VLLM_VENV:-$root/.venv-vllm}"
bash "$root/toolkits/vllm/install_cpu.sh" "$venv"

cd "$root"
export OMP_NUM_THREADS=1 # as every worker process has it: another number of threads gives other bits
exec "$venv/bin/python" -m pytest -o testpaths=tests/vllm "$@"
