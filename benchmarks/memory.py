"""Measure the resident memory of a run's processes over many steps: Ray's GCS and raylet, the driver, the workers.

    python benchmarks/memory.py [--steps 3000] [--every 250] [--out DIR] [key=value ...]

Starts the embedded default with minimal steps on a local Ray, and prints a row of megabytes every ``--every`` steps.
Shared memory (the object store) is left out. ``key=value`` are hydra overrides. Nothing may grow with the number of
steps: the last column of the summary is the growth per step over the second half of the run.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import psutil

SETTINGS = {
    "runner.save_interval": "-1",
    "runner.val_check_interval": "-1",
    "data.arithmetic.num_problems": "16",
    "data.rollout_batch_size": "2",
    "algorithm.group_size": "2",
    "algorithm.training_batch_size_per_gpu": "4",
    "cluster.component_placement": "{actor: 0-1, rollout: 0, reward: 0}",
    "cluster.warm_spares": "0",
}
_STEP = re.compile(r"step +(\d+)/")
_NAMES = {"gcs_server": "gcs_server", "raylet": "raylet", "ray::ActorGroup": "actor", "ray::RolloutGroup": "rollout"}
_NAMES |= {"ray::RewardGroup": "reward"}
_DRIVER = "rlinf_lite.driver"

Row = dict[str, float]
"""Megabytes by process."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, help="default: %(default)s")
    parser.add_argument("--every", type=int, default=250, help="steps between two rows (default: %(default)s)")
    parser.add_argument("--out", help="where the run writes (default: a temporary directory)")
    options, overrides = parser.parse_known_args()
    rows: dict[int, Row] = {}
    with tempfile.TemporaryDirectory() as directory:
        for step, row in measure(options.steps, options.every, options.out or directory, overrides):
            if not rows:
                print("   step " + " ".join(f"{name:>10}" for name in row))
            rows[step] = row
            print(f"{step:7d} " + " ".join(f"{megabytes:10.1f}" for megabytes in row.values()), flush=True)
    for name, kilobytes in growth(rows).items():
        print(f"{name:>10}: {kilobytes:+.2f} kB per step from step {_middle(rows)} to {max(rows)}")
    return 0


def measure(steps: int, every: int, directory: str, overrides: list[str]) -> Iterator[tuple[int, Row]]:
    """(step, memory) of a run, every so many steps."""
    settings = {**SETTINGS, "runner.max_steps": str(steps), "runner.output_dir": directory}
    command = [sys.executable, "-u", "-m", "rlinf_lite.main_math", *(f"{k}={v}" for k, v in settings.items())]
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    with subprocess.Popen([*command, *overrides], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        for line in parent.stdout:
            found = _STEP.match(line)
            if found and int(found[1]) % every == 0:
                yield int(found[1]), _memory(psutil.Process(parent.pid))
    if parent.returncode != 0:
        sys.exit(f"the run ended with exit code {parent.returncode}")


def _memory(parent: psutil.Process) -> Row:
    row = {"parent": _megabytes(parent)}
    for process in parent.children(recursive=True):
        try:
            command = process.name() if process.name() in _NAMES else " ".join(process.cmdline())
            if _DRIVER in process.cmdline():
                row["driver"] = _megabytes(process)
            name = next((name for start, name in _NAMES.items() if command.startswith(start)), None)
            if name is not None:
                name = name if name not in row else f"{name} {sum(known.startswith(name) for known in row)}"
                row[name] = _megabytes(process)
        except psutil.NoSuchProcess:
            continue
    return row


def _megabytes(process: psutil.Process) -> float:
    info = process.memory_info()
    return (info.rss - info.shared) / 1e6


def _middle(rows: dict[int, Row]) -> int:
    return sorted(rows)[(len(rows) - 1) // 2]


def growth(rows: dict[int, Row]) -> dict[str, float]:
    """Kilobytes per step by process, over the second half of the run."""
    first, last = _middle(rows), max(rows)
    return {name: 1e3 * (rows[last][name] - rows[first][name]) / max(1, last - first) for name in rows[last]}


if __name__ == "__main__":
    sys.exit(main())
