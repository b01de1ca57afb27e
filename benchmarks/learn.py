"""Measure how fast the embedded default learns: steps and seconds to a mean reward above 0.9, for several seeds.

    python benchmarks/learn.py [--seeds 1 2 3] [hydra overrides ...]

Seconds count from the first step, as the run's own metrics give them; start-up is printed beside them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WINDOW = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments, overrides = parser.parse_known_args()
    print(
        f"{'seed':>6} {'first':>7} {'steps to >0.9':>14} {'seconds':>8} {'last 10':>8} "
        f"{'val':>6} {'start-up':>9} {'s/step':>7}"
    )
    failed = [seed for seed in arguments.seeds if not report(seed, overrides)]
    sys.exit(f"seeds that did not reach 0.9: {failed}" if failed else 0)


def report(seed: int, overrides: list[str]) -> bool:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        settings = [f"actor.seed={seed}", f"data.seed={seed}", f"runner.output_dir={directory}", *overrides]
        subprocess.run([sys.executable, "-m", "rlinf_lite.main_math", *settings], check=True, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - started
        lines = next(Path(directory).glob("*/metrics.jsonl")).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rewards = [row["reward/mean"] for row in rows]
    seconds = [row["time/step"] for row in rows]
    reached = next((i for i in range(WINDOW, len(rows) + 1) if sum(rewards[i - WINDOW : i]) / WINDOW > 0.9), None)
    shown = f"{reached:>14} {sum(seconds[:reached]):>8.1f}" if reached else f"{'never':>14} {'-':>8}"
    last, val = sum(rewards[-WINDOW:]) / WINDOW, rows[-1].get("val/accuracy", float("nan"))
    median = sorted(seconds)[len(seconds) // 2]
    print(
        f"{seed:>6} {rewards[0]:>7.3f} {shown} {last:>8.3f} {val:>6.3f} {wall - sum(seconds):>9.1f} {median:>7.3f}",
        flush=True,
    )
    return reached is not None


if __name__ == "__main__":
    main()
