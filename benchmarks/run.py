"""Measures every row of docs/performance.md, and writes its table.

    python benchmarks/run.py                         all rows: about an hour on two cores with nothing else to do
    python benchmarks/run.py step.py update.py       the rows of some scripts; the others keep their figures
    python benchmarks/run.py --table                 only write the table

Figures are kept as JSON in benchmarks/results, a file per script.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "performance.md"
BEGIN, END = "<!-- rows: python benchmarks/run.py -->\n", "<!-- end of rows -->\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", choices=[*scripts(), []], help="default: all")
    parser.add_argument("--rounds", type=int, help="default: each script's own")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for name in [] if options.table else options.scripts or scripts():
        print(f"-- {name}", flush=True)
        given = [] if options.rounds is None else ["--rounds", str(options.rounds)]
        subprocess.run([sys.executable, HERE / name, *given, "--out", RESULTS / f"{Path(name).stem}.json"], check=True)
    PAGE.write_text(with_table(PAGE.read_text()))


def scripts() -> list[str]:
    """The scripts of rows: those that `_paired` finishes."""
    found = [
        path
        for path in HERE.glob("[!_]*.py")
        if re.search(r"^from _paired import .*\bfinish\b", path.read_text(), re.M)
    ]
    return sorted(path.name for path in found)


def with_table(page: str) -> str:
    """The page with the table of what is in `RESULTS`."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + table(results()) + END + rest.partition(END)[2]


def results() -> list[dict[str, Any]]:
    """All rows, by number."""
    rows = [row for file in RESULTS.glob("*.json") for row in json.loads(file.read_text())]
    return sorted(rows, key=lambda row: (int(re.sub(r"\D", "", row["number"])), row["number"]))


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| # | work | against | ours | other | ratio (by round) | goal | |", "|---|---|---|---|---|---|---|---|"]
    return "\n".join([*lines, *map(_line, rows)]) + "\n"


def _line(row: dict[str, Any]) -> str:
    ours, others = (statistics.median(row[side]) for side in ("ours", "others"))
    pairs = sorted(mine / theirs for mine, theirs in zip(row["ours"], row["others"], strict=True))
    sign = "≤" if row["at_most"] else "≥"
    cells = (
        row["number"],
        row["work"],
        row["other"],
        f"{ours:.3g} {row['unit']}",
        f"{others:.3g} {row['unit']}",
        f"**{row['ratio']:.2f}** ({pairs[0]:.2f}-{pairs[-1]:.2f})",
        f"{sign} {row['goal']:g}",
        "reached" if row["reached"] else "missed",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
