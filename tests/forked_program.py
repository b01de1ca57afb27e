"""A program in a forked process, as if Python had been started for it: see `run_forked` in ``conftest.py``.

Run by `runpy`, with what `run_forked` gives.
"""

import atexit
import gc
import os
import runpy
import sys
import threading


def run(arguments, code, directory, environment, stdout, stderr):
    gc.freeze()  # what is preloaded stays
    atexit._clear()  # it is not this process that cleans up after them
    for number, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    try:
        if code is None:
            runpy.run_path(arguments[0], run_name="__main__")
        else:
            exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()


if __name__ == "forked":
    run(ARGUMENTS, CODE, DIRECTORY, ENVIRONMENT, STDOUT, STDERR)  # noqa: F821
