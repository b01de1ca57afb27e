"""One driver a run folder: a second one is refused, with the holder named. A dead holder holds nothing."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlinf_lite.config import ConfigError


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep ``folder`` for this process; the kernel gives it back when the process ends, however it ends.

    Raises:
        ConfigError: another process holds it.
    """
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"runner.output_dir: {folder} is in use by {file.read().strip() or 'another run'}; wait for its end, "
                "or choose another runner.experiment_name"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
