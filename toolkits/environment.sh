# Sourced by run_main_math.sh and tests/run.sh: sets `python` to an interpreter that has rlinf_lite from this checkout and all
# its requirements. That is the active environment if it has them, otherwise .venv beside this directory, which is created,
# completed or repaired as needed.
#
#   use_environment [extra]     extra: a name under [project.optional-dependencies] in pyproject.toml

repo_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

environment_error() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

# Fails and prints the reason if the interpreter $1 cannot run this checkout with extra $2.
# Runs in / because inside the checkout "import rlinf_lite" works without an installation.
runs_this_checkout() {
    (cd / && "$1" - "$repo_root" "$2" 2>/dev/null) <<'PYTHON'
import importlib.metadata as metadata
import importlib.util
import os
import re
import sys

root, extra = sys.argv[1:]


def missing():
    if sys.version_info < (3, 11):
        return "it is Python %d.%d, and 3.11 or newer is needed" % sys.version_info[:2]
    try:
        requirements = metadata.requires("rlinf_lite") or []
    except metadata.PackageNotFoundError:
        return "rlinf_lite is not installed in it"
    spec = importlib.util.find_spec("rlinf_lite")
    if spec is None or not spec.origin:
        return "its rlinf_lite cannot be imported"
    if os.path.realpath(os.path.dirname(os.path.dirname(spec.origin))) != root:
        return "its rlinf_lite is another copy, in " + os.path.dirname(spec.origin)
    absent = []
    for requirement in requirements:
        extras = re.findall(r"extra\s*==\s*['\"]([^'\"]+)", requirement)
        name = re.match(r"[\w.-]+", requirement).group()
        if not extras or extra in extras:
            try:
                metadata.version(name)
            except metadata.PackageNotFoundError:
                absent.append(name)
    return "it has no " + ", ".join(absent) if absent else None


reason = missing()
if reason:
    print(reason)
    sys.exit(1)
PYTHON
}

# What an installation depends on; a .venv with another marker is completed.
installation_key() {
    printf '%s\n' "$repo_root"
    cat "$repo_root/pyproject.toml" "$repo_root/constraints.txt" | cksum
}

is_installed() { # venv extra
    local marker
    for marker in "$1/installed${2:+-$2}"*; do # an installation with an extra is enough where none is asked for
        if [[ -f "$marker" && "$(cat "$marker")" == "$(installation_key)" ]]; then
            runs_this_checkout "$1/bin/python" "$2" >/dev/null
            return
        fi
    done
    return 1
}

find_new_python() {
    local name
    for name in python3 python python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    environment_error "Python 3.11 or newer is needed, and there is none on PATH (python3 is $(python3 -V 2>&1)); install
one, for example 'apt install python3.11 python3.11-venv' or 'conda create -n rlinf_lite python=3.11', and start again"
}

make_venv() { # venv
    local base
    base="$(find_new_python)" || exit 1
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        environment_error "$base has no venv module; install it, for example 'apt install python3-venv', and start again"
    "$base" -m venv --clear "$1" || environment_error "$1 could not be created: see above"
}

install_into() { # venv extra
    "$1/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || make_venv "$1"
    rm -f "$1"/installed*
    "$1/bin/python" -m pip install --quiet --disable-pip-version-check -c "$repo_root/constraints.txt" \
        -e "$repo_root${2:+[$2]}" ||
        environment_error "the packages could not be installed into $1: see above. Start again to continue"
    installation_key >"$1/installed${2:+-$2}" # last: without it the next start installs again
}

use_environment() {
    local extra="${1:-}" venv="$repo_root/.venv" active reason="there is no Python on PATH"
    active="$(command -v python || command -v python3 || true)"
    if [[ -n "$active" ]] && reason="$(runs_this_checkout "$active" "$extra")"; then
        python="$active"
        return
    fi
    echo "environment: $venv, not ${active:-the active one}: ${reason:-it does not run}" >&2
    if ! is_installed "$venv" "$extra"; then
        echo "environment: installing into $venv, which takes some minutes the first time ..." >&2
        # Under a lock: two first starts at once would disturb each other.
        (
            { command -v flock >/dev/null && flock 9 2>/dev/null; } || true
            is_installed "$venv" "$extra" || install_into "$venv" "$extra"
        ) 9<"$repo_root/pyproject.toml" || exit 1
    fi
    export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
    python="$venv/bin/python"
}
