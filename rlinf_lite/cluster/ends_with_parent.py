"""Becomes another command, which the kernel kills as soon as its parent, a raylet, is dead. Linux only.

    python -I -S ends_with_parent.py COMMAND ARGUMENTS...

Ray's agents notice the death of their raylet themselves, but then try to tell the GCS for a minute, dead or not.
Imports the standard library only, and little of it.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # outlives the change of program
    if os.environ.get("RAY_RAYLET_PID", str(os.getppid())) != str(os.getppid()):
        sys.exit("the raylet was dead before")
    os.execvp(sys.argv[1], sys.argv[1:])
