"""``python -m rlinf_lite.report``: a run's folder as one HTML page, and its charts as PNGs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """\
Write report.html, one page that needs nothing else to be looked at: curves, time by phase, checkpoints and restarts,
sample rollouts, config; and its charts as PNGs (with matplotlib: pip install -e '.[report]'). The run may be
going on meanwhile."""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m rlinf_lite.report", description=DESCRIPTION)
    top.add_argument("run", metavar="RUN_DIR", type=Path, help="the run's folder, {output_dir}/{experiment_name}")
    top.add_argument("--output", metavar="DIR", type=Path, help="where to write (default: RUN_DIR/report)")
    other = "runs whose curves are laid over this one's"
    top.add_argument("--compare", metavar="OTHER_RUN", type=Path, nargs="+", default=[], help=other)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one line on stderr."""
    options = parser().parse_args(arguments)
    from rlinf_lite.report.run import ReportError

    try:
        for line in write(options.run, options.output or options.run / "report", options.compare):
            print(line)
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write(folder: Path, output: Path, others: Sequence[Path]) -> list[str]:
    """The files; returns what to say of them.

    Raises:
        ReportError: one of the folders is no run's.
        OSError: ``output`` cannot be written.
    """
    from rlinf_lite.report.page import page
    from rlinf_lite.report.run import read_run

    runs = [read_run(path) for path in (folder, *others)]
    output.mkdir(parents=True, exist_ok=True)
    html, aside = output / "report.html", output / f".report-{os.getpid()}.html"
    aside.write_text(page(runs), encoding="utf-8")
    aside.replace(html)
    said = [f"{html} ({html.stat().st_size / 1e6:.2f} MB)"]
    try:
        from rlinf_lite.report.png import write_pngs

        pngs = write_pngs(runs, output)
    except ImportError:
        return [*said, "no PNGs: they need matplotlib; pip install -e '.[report]'"]
    return [*said, f"{output}/*.png ({len(pngs)} charts)"] if pngs else said


if __name__ == "__main__":
    sys.exit(main())
