#!/usr/bin/env bash
# Runs lint, types and all tests. With arguments it runs only pytest and passes them on: bash tests/run.sh tests/unit -k counters
# Paths are relative to the top of the checkout.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../toolkits/environment.sh"
use_environment test

cd "$repo_root"
if (($# == 0)); then
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    "$python" -m mypy rlinf_lite
    set -- -n 2 --dist loadgroup # two whole runs at a time at most: groups "e2e" (they share one) and "alone"
fi
exec "$python" -m pytest "$@"
