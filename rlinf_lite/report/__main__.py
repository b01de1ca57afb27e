"""The command line ``python -m rlinf_lite.report RUN_DIR``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rlinf_lite.durable import replace_text
from rlinf_lite.paths import argument

DESCRIPTION = """\
Write report.html, one self-contained page: curves, time by phase, checkpoints and restarts, sample rollouts, config.
The run may still be in progress."""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m rlinf_lite.report", description=DESCRIPTION)
    top.add_argument(
        "run", metavar="RUN_DIR", type=argument, help="the run's directory, {output_dir}/{experiment_name}"
    )
    top.add_argument("--output", metavar="DIR", type=argument, help="where to write (default: RUN_DIR/report)")
    other = "more runs to draw in the same charts"
    top.add_argument("--compare", metavar="OTHER_RUN", type=argument, nargs="+", default=[], help=other)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after an error message."""
    options = parser().parse_args(arguments)
    from rlinf_lite.report.run import ReportError

    try:
        html = write(options.run, options.output or options.run / "report", options.compare)
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{html} ({html.stat().st_size / 1e6:.2f} MB)")
    return 0


def write(directory: Path, output: Path, others: Sequence[Path]) -> Path:
    """Write the page of the run in ``directory``, compared with ``others``; returns the path of the page.

    Raises:
        ReportError: one of the directories is not a run's.
        OSError: ``output`` cannot be written.
    """
    from rlinf_lite.report.page import render
    from rlinf_lite.report.run import read_run

    text = render([read_run(path) for path in (directory, *others)])
    output.mkdir(parents=True, exist_ok=True)
    html = output / "report.html"
    replace_text(html, text, durable=False, several_writers=True)
    return html


if __name__ == "__main__":
    sys.exit(main())
