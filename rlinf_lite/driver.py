"""The driver process: parse, build, run, close. `main_math` starts it."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import suppress
from typing import NoReturn

from rlinf_lite.cluster.forks.client import ForkServer, can_fork
from rlinf_lite.cluster.forks.environment import worker_env
from rlinf_lite.recovery.handover import ParentLink
from rlinf_lite.runner.signals import end, end_at_once, end_without_parent
from rlinf_lite.stopwatch import Stopwatch

if __name__ == "__main__":
    # Before all other imports, which take seconds.
    _startup = Stopwatch()
    end_at_once()
    _link = ParentLink.connect()
    _link.watch(end_without_parent)
    gc.disable()  # as in `quick_imports`
    # The workers of most configs can be forked from it: it imports what they need while this process reads the config.
    _forks = ForkServer(worker_env(threads=1, device="cpu")) if can_fork("auto") else None

from rlinf_lite import numerics

os.environ.update(numerics.environment())  # read when torch is imported: sums must not depend on the shell

from rlinf_lite.config.compose import load
from rlinf_lite.config.unusual import unusual_values


def main(
    arguments: list[str], link: ParentLink, startup: Stopwatch | None = None, forks: ForkServer | None = None
) -> int:
    """Run the config named by the first argument (or the embedded default) with the overrides that follow it.

    Args:
        link: to the parent process, whose handover says what earlier drivers of this run have come to.
        startup: runs since this process began; None: since now.
        forks: as for `launch`.

    Returns:
        The exit code.
    """
    from rlinf_lite.runner.failures import explain

    startup = startup or Stopwatch()
    try:
        notes: list[str] = []
        config = load(arguments, notes.append)
        for line in (*notes, *unusual_values(config)):
            print(f"note: {line}", flush=True)
        startup.lap("config")
        from rlinf_lite.launch import launch
        from rlinf_lite.recovery.directories import checkpoints_directory, has_saved

        if link.handover.was_built and has_saved(config.runner, checkpoints_directory(config.runner)):
            config = load([*arguments, "runner.resume_dir=auto"])
        gc.enable()
        startup.lap("imports")
        return launch(config, link, startup, forks)
    except BaseException as error:
        message, code = explain(error)
        if message is None:
            sys.excepthook(*sys.exc_info())
        else:
            print(message, file=sys.stderr, flush=True)
        return code


def leave(code: int, link: ParentLink) -> NoReturn:
    """End the process. One that ends early waits for no thread and no library, and leaves nothing of its Ray behind."""
    link.report(exit_code=code)
    if code == 0:
        sys.exit(0)
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    end(code)


if __name__ == "__main__":
    leave(main(sys.argv[1:], _link, _startup, _forks), _link)
