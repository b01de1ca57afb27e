"""Row 5 of docs/performance.md: what Ray and the driver add to a step of the embedded default.

The run as a user starts it, with one actor rank, is compared with the same steps in one process: the same workers'
objects, called directly, with the same weights, samples, rewards, updates and replicas; both log the same rewards. The
row is the difference beside a step of 0.15 s; both sides are among its details.
Left out on both sides: saves, validations and the warm spare. The seconds of a step are those between the lines of two
steps, so that all that the driver does is in them.

    python benchmarks/overhead.py [--rounds 5] [--steps 60] [--out FILE.json] [key=value ...]

``key=value`` are hydra overrides, for both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil
from _paired import Row, arguments, finish
from _run import STEP, Run

from rlinf_lite import numerics

SETTINGS = {
    "cluster.component_placement.actor": "0",
    "cluster.warm_spares": "0",
    "runner.save_interval": "-1",
    "runner.val_check_interval": "-1",
}
_FIRST = 10
"""Steps that are not counted: caches are filled, and processes that start others end."""
_STEP_SECONDS = 0.15
"""Of the step of which Ray and the driver may add a tenth."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """Medians over the steps of one side, except the first ones."""

    seconds: float
    cpu_seconds: float
    """Of all processes of the run, Ray's among them; their mean, since the clock has a resolution of 0.01 s."""
    phases: dict[str, float]
    rewards: list[float]


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--steps", type=int, default=60, help="steps of a round (default: %(default)s)")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    options, overrides = parser.parse_known_args()
    settings = {**SETTINGS, **dict(override.split("=", 1) for override in overrides)}
    settings["runner.max_steps"] = str(options.steps)
    if options.plain:
        print(json.dumps(plain_steps(settings, options.steps)))
        return
    row = Row(
        "5",
        "what Ray and the driver add to a step of the embedded default with one actor rank",
        f"a step of {_STEP_SECONDS} s",
        goal=0.10,
    )
    pairs = []
    for number in range(options.rounds):
        sides = [with_ray, in_one_process] if number % 2 == 0 else [in_one_process, with_ray]
        found = {side: side(settings, options.steps) for side in sides}
        ours, other = found[with_ray], found[in_one_process]
        if ours.rewards != other.rewards:
            sys.exit("the two sides do not train alike: their rewards differ")
        row.ours.append(ours.seconds - other.seconds)
        row.others.append(_STEP_SECONDS)
        pairs.append((ours, other))
    row.details = details(pairs)
    finish([row], options.out)


def details(pairs: list[tuple[Steps, Steps]]) -> dict[str, object]:
    """What explains the row's figures."""
    seconds = [statistics.median(side.seconds for side in sides) for sides in zip(*pairs, strict=True)]
    cpu = [statistics.median(side.cpu_seconds for side in sides) for sides in zip(*pairs, strict=True)]
    return {
        "seconds per step": f"{seconds[0]:.4f}, in one process {seconds[1]:.4f}",
        "ratio of both": round(statistics.median(ours.seconds / other.seconds for ours, other in pairs), 3),
        "processor seconds per step, all processes": f"{cpu[0]:.4f}, in one process {cpu[1]:.4f}",
        "cpu_ratio": round(cpu[0] / cpu[1], 3),
        "seconds by phase": _phases([ours for ours, _ in pairs]),
        "seconds by phase, in one process": _phases([other for _, other in pairs]),
    }


def _phases(sides: list[Steps]) -> str:
    names = sides[0].phases
    medians = {name: statistics.median(side.phases[name] for side in sides) for name in names}
    medians["other"] = statistics.median(side.seconds for side in sides) - sum(medians.values())
    return ", ".join(f"{name} {seconds:.4f}" for name, seconds in medians.items())


# -- the two sides


def with_ray(settings: dict[str, str], steps: int) -> Steps:
    """A run of its own."""
    times, cpu = [], []
    with tempfile.TemporaryDirectory() as scratch:
        with Run(Path(scratch, "overhead"), settings) as run:
            processes = None
            for step in range(steps):
                times.append(run.until(STEP)[0])
                if step == _FIRST - 1:
                    processes = [*run.processes()]
                if step in (_FIRST - 1, steps - 2) and processes is not None:
                    cpu.append(sum(_cpu_seconds(processes)))
            run.wait()
        rows = [json.loads(line) for line in Path(scratch, "overhead", "metrics.jsonl").read_text().splitlines()]
    phases = [
        {key.removeprefix("time/"): value for key, value in row.items() if key.startswith("time/")}
        for row in rows[_FIRST:]
    ]
    return Steps(
        seconds=statistics.median(after - before for before, after in pairwise(times[_FIRST - 1 :])),
        cpu_seconds=(cpu[1] - cpu[0]) / (steps - 1 - _FIRST),
        phases={name: statistics.median(each[name] for each in phases) for name in phases[0] if name != "step"},
        rewards=[row["reward/mean"] for row in rows],
    )


def _cpu_seconds(processes: list[psutil.Process]) -> Iterator[float]:
    for process in processes:
        times = process.cpu_times()
        yield times.user + times.system


def in_one_process(settings: dict[str, str], steps: int) -> Steps:
    """A process that calls the workers' objects directly."""
    overrides = [f"{key}={value}" for key, value in settings.items()]
    command = [sys.executable, os.path.abspath(__file__), "--plain", f"--steps={steps}", *overrides]
    environment = {**os.environ, **numerics.environment(), "TOKENIZERS_PARALLELISM": "false"}  # as a worker's
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return Steps(**json.loads(done.stdout.splitlines()[-1]))


def plain_steps(settings: dict[str, str], steps: int) -> dict[str, object]:
    """In that process: the fields of `Steps`."""
    from _plain_step import PlainRun

    from rlinf_lite.config.compose import load
    from rlinf_lite.observability import PhaseTimer
    from rlinf_lite.quick_imports import quick_imports

    with quick_imports():
        run = PlainRun(load([f"{key}={value}" for key, value in settings.items()]))
        run.publish(0)
    times, cpu, phases, rewards = [], [], [], []
    for step in range(1, steps + 1):
        timer = PhaseTimer()
        rewards.append(run.step(step, timer))
        phases.append(timer.seconds)
        times.append(time.perf_counter())
        cpu.append(time.process_time())
    counted = pairwise(times[_FIRST - 1 :])
    return {
        "seconds": statistics.median(after - before for before, after in counted),
        "cpu_seconds": (cpu[-1] - cpu[_FIRST - 1]) / (steps - _FIRST),
        "phases": {name: statistics.median(each[name] for each in phases[_FIRST:]) for name in phases[0]},
        "rewards": rewards,
    }


if __name__ == "__main__":
    main()
