"""Starts a worker's Python in place of Ray's own `setup_worker.py`, which imports Ray for it: a second per worker.

    python setup_worker.py --serialized-runtime-env-context=JSON --language=PYTHON default_worker.py ARGUMENTS...

Knows what a Ray of the driver's own asks for: environment variables, and a command in place of Python, the shim's.
Leaves everything else to Ray's own. Imports the standard library only.
"""

import argparse
import json
import os
import shlex
import sys

_KNOWN = {"command_prefix", "env_vars", "java_jars", "py_executable"}


def main() -> None:
    """Become the worker."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--serialized-runtime-env-context", default="null")
    parser.add_argument("--language")
    options, worker = parser.parse_known_args()
    context = json.loads(options.serialized_runtime_env_context)
    if context is None or options.language != "PYTHON" or {name for name in context if context[name]} - _KNOWN:
        program = next(word for word in worker if word.endswith(".py"))
        theirs = os.path.join(os.path.dirname(program), "setup_worker.py")
        os.execv(sys.executable, [sys.executable, theirs, *sys.argv[1:]])
    os.environ.update({name: os.path.expandvars(value) for name, value in (context.get("env_vars") or {}).items()})
    python = context.get("py_executable") or shlex.quote(sys.executable)
    prefix = context.get("command_prefix") or []
    os.execvp("bash", ["bash", "-c", " ".join([*prefix, "exec", python, *map(shlex.quote, worker)])])


if __name__ == "__main__":
    main()
