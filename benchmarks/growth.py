"""Row 11 of docs/performance.md: how time grows with the size of the work, as an exponent; 1 is a straight line.

    python benchmarks/growth.py [--rounds 3] [--only prompts group length ranks save driver] [--out FILE.json]

A figure is the slope of log(seconds) over log(size), by least squares over all sizes of an axis. Seconds are medians
of a few steps, and sizes are measured in turn.

    prompts  a step in one process (as in overhead.py): the embedded default with 16 to 256 prompts
    group    the same with 4 to 64 responses per prompt
    length   the same with a random model that never stops: 16 to 256 new tokens
    ranks    a whole run of the embedded default with 1 to 4 actor ranks, each training on 32 prompts of its own:
             processor seconds per step of all processes, since the ranks share the cores
    save     a durable save of 64 MB to 1 GB
    driver   processor seconds of the driver per step with 4 to 256 actor ranks, which are faked, each with a unit of
             training of its own
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from _paired import Row, arguments, finish

from rlinf_lite import numerics

os.environ.update(numerics.environment())  # as a worker's; read when torch is imported

_STEPS = 4
_ONE_RANK: Mapping[str, Any] = {
    "cluster.component_placement.actor": 0,
    "runner.max_steps": _STEPS,
    "algorithm.training_batch_size_per_gpu": 64,
}
Measure = Callable[[int], float]


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--only", nargs="+", choices=[*AXES], default=[*AXES], help="axes; default: all")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for axis in options.only:
            what, sizes, make = AXES[axis]
            number = f"11{'abcdef'[[*AXES].index(axis)]}"
            rows.append(measured(number, what, sizes, make(Path(scratch)), options.rounds))
    finish(rows, options.out)


def measured(number: str, what: str, sizes: Sequence[int], measure: Measure, rounds: int) -> Row:
    """The exponent of each round."""
    row = Row(number, what, "a straight line", goal=1.1, unit="(exponent)")
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for turn in range(rounds):
        for size in sizes if turn % 2 == 0 else reversed(sizes):
            seconds[size].append(measure(size))
        row.ours.append(exponent({size: found[-1] for size, found in seconds.items()}))
        row.others.append(1.0)
    medians = {size: statistics.median(found) for size, found in seconds.items()}
    row.details = {"seconds by size": ", ".join(f"{size}: {value:.4g}" for size, value in medians.items())}
    last = {size: medians[size] for size in sizes[-2:]}
    row.details["exponent of the last two sizes"] = round(exponent(last), 3)
    return row


def exponent(seconds: Mapping[int, float]) -> float:
    """The slope of log(seconds) over log(size)."""
    x, y = [math.log(size) for size in seconds], [math.log(value) for value in seconds.values()]
    return statistics.linear_regression(x, y).slope


# -- what is measured


def in_one_process(scratch: Path, key: str, settings: Mapping[str, Any]) -> Measure:
    """Median seconds of a step in this process; ``key`` is set to the size."""
    from _plain_step import PlainRun

    from rlinf_lite.config.compose import load
    from rlinf_lite.observability import PhaseTimer

    def measure(size: int) -> float:
        given = {**_ONE_RANK, **settings, key: size}
        run, seconds = PlainRun(load([f"{name}={value}" for name, value in given.items()])), []
        for step in range(1, _STEPS + 1):
            began = time.perf_counter()
            run.step(step, PhaseTimer())
            seconds.append(time.perf_counter() - began)
        run.close()
        return statistics.median(seconds[1:])

    return measure


def prompts(scratch: Path) -> Measure:
    return in_one_process(scratch, "data.rollout_batch_size", {})


def group(scratch: Path) -> Measure:
    return in_one_process(scratch, "algorithm.group_size", {"data.rollout_batch_size": 16})


def length(scratch: Path) -> Measure:
    import _random_model

    model = _random_model.save("tiny", scratch / "tiny", words=True)
    settings = {
        "actor.model.model_path": model,
        "data.rollout_batch_size": 8,
        "algorithm.training_batch_size_per_gpu": 16,
        "runner.seq_length": 272,
    }
    return in_one_process(scratch, "algorithm.sampling_params.max_new_tokens", settings)


def ranks(scratch: Path) -> Measure:
    from overhead import SETTINGS, with_ray

    def measure(size: int) -> float:
        placement = {"cluster.component_placement.actor": f"0-{size - 1}", "data.rollout_batch_size": str(32 * size)}
        return with_ray({**SETTINGS, **placement, "runner.max_steps": "24"}, 24).cpu_seconds

    return measure


def save(scratch: Path) -> Measure:
    import torch

    from rlinf_lite.checkpoint import Checkpointer

    tensors = [torch.randn(1 << 20) for _ in range(256)]  # 4 MB each
    checkpointer, numbers = Checkpointer(scratch / "checkpoints", seed=0), iter(range(1, 1 << 30))

    def measure(size: int) -> float:
        state = {"model": {f"w{index}": tensor for index, tensor in enumerate(tensors[: size // 4])}}
        began = time.perf_counter()
        report = checkpointer.save(next(numbers), state)
        seconds = time.perf_counter() - began
        for file in Path(str(report.path)).rglob("*.distcp"):
            file.unlink()
        return seconds

    return measure


def driver(scratch: Path) -> Measure:
    from _faked_workers import driver_seconds

    from rlinf_lite.config.compose import load

    def measure(size: int) -> float:
        given = {
            "data.rollout_batch_size": size,
            "algorithm.group_size": 8,
            "algorithm.training_batch_size_per_gpu": 8,
        }
        return driver_seconds(load([f"{name}={value}" for name, value in given.items()]), size, 1 + _STEPS)

    return measure


AXES: Mapping[str, tuple[str, Sequence[int], Callable[[Path], Measure]]] = {
    "prompts": ("step time against prompts", (16, 32, 64, 128, 256), prompts),
    "group": ("step time against group size", (4, 8, 16, 32, 64), group),
    "length": ("step time against new tokens", (16, 32, 64, 128, 256), length),
    "ranks": ("processor time of a step against ranks", (1, 2, 4), ranks),
    "save": ("save time against megabytes", (64, 128, 256, 512, 1024), save),
    "driver": ("driver time per step against ranks", (4, 16, 64, 256), driver),
}


if __name__ == "__main__":
    main()
