#!/usr/bin/env bash
# Lint, types and all tests; with arguments only pytest, which gets them: bash tests/run.sh tests/unit -k counters.
# Paths start at the top of the checkout.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../toolkits/environment.sh"
use_environment test

unset PYTHONDONTWRITEBYTECODE # each of the tests' processes would compile all modules again

cd "$repo_root"
if (($# > 0)); then
    exec "$python" -m pytest "$@"
fi
"$python" -m ruff check .
"$python" -m ruff format --check .
types=$(mktemp)
trap 'rm -f "$types"' EXIT
"$python" -m mypy rlinf_lite benchmarks >"$types" 2>&1 & # one core's work, beside the tests
mypy=$!
failed=0
"$python" -m pytest -n 2 --dist loadgroup || failed=$? # whole runs and groups of ranks have processes of their own
wait "$mypy" || { # quiet if the types are right, so that pytest's summary is the last line
    failed=$?
    cat "$types"
}
exit "$failed"
