"""The entry of a training run: a parent process that starts the driver and restarts it. Imports nothing heavy."""

from __future__ import annotations

import sys

from rlinf_lite.parent import Parent, driver_command


def main() -> int:
    """Run ``[config name or path] [hydra overrides ...]`` from the command line; returns the exit code."""
    return Parent(driver_command(sys.orig_argv, len(sys.argv) - 1)).run()


if __name__ == "__main__":
    sys.exit(main())
