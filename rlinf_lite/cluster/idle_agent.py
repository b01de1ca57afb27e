"""Takes the place of one of Ray's agents, and serves nothing. The kernel ends it with its raylet. Linux only.

    python -I -S idle_agent.py NAME[,NAME...] COMMAND ARGUMENTS...

COMMAND is that of Ray's own agent, a Python that imports Ray and more. A raylet waits until its agents have written
their ports to files, ``<NAME>_<node id>`` in the session's directory, and ends when an agent ends. A runtime
environment that somebody asks for all the same is refused. Imports the standard library only, and little of it.
"""

import ctypes
import os
import signal
import socket
import sys
from contextlib import suppress

_PR_SET_PDEATHSIG = 1
_TEXT = b"a Ray of rlinf_lite's own has no runtime environments"
_REFUSAL = b"HTTP/1.1 501 Not Implemented\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(_TEXT), _TEXT)


def main() -> None:
    """Write the ports, and refuse what is asked for until the raylet ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.environ.get("RAY_RAYLET_PID", str(os.getppid())) != str(os.getppid()):
        sys.exit("the raylet was dead before")
    given = dict(word.split("=", 1) for word in sys.argv[3:] if word.startswith("--") and "=" in word)
    address = given["--node-ip-address"]
    listener = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    for name in sys.argv[1].split(","):
        path = os.path.join(given["--session-dir"], f"{name}_{given['--node-id']}")
        with open(f"{path}.tmp", "w") as file:
            file.write(str(listener.getsockname()[1]))
        os.rename(f"{path}.tmp", path)
    while True:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            connection.settimeout(1.0)
            connection.recv(65536)
            connection.sendall(_REFUSAL)


if __name__ == "__main__":
    main()
