#!/usr/bin/env bash
# Runs all tests of the vLLM engine, about 10 minutes on 2 cores. Arguments go to pytest. The environment is .venv-vllm or
# $VLLM_VENV; toolkits/vllm/install_cpu.sh creates it if it is missing.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)"
venv="${VLLM_VENV:-$root/.venv-vllm}"
bash "$root/toolkits/vllm/install_cpu.sh" "$venv"

cd "$root"
exec "$venv/bin/python" -m pytest -o testpaths=tests/vllm "$@"
