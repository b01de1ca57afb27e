"""Row 6 of docs/performance.md: publishing the weights of a 135M model, beside one copy of the same bytes in memory.

A run with random weights in SmolLM2-135M's shape (fp32, one actor rank, one engine) and steps that hardly train: the
seconds are those of its phase `sync`, from the driver's call until the engine has every weight and has compared its
checksum. The copy is torch's, from one set of tensors of these shapes to another, with one thread, as a worker has.

    python benchmarks/weights.py [--rounds 3] [--out FILE.json] [key=value ...]

``key=value`` are hydra overrides, for example ``rollout.model.precision=bf16``.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import _random_model
import torch
from _paired import Row, arguments, finish, in_turn
from _run import Run

from rlinf_lite.models.build import DTYPES

_STEPS, _SKIPPED = 12, 4
SETTINGS = {
    "runner.max_steps": _STEPS,
    "runner.save_interval": -1,
    "runner.val_check_interval": -1,
    "runner.checkpoint.memory_replicas": 0,
    "cluster.component_placement.actor": 0,
    "cluster.warm_spares": 0,
    "cluster.self_check": "false",
    "algorithm.group_size": 2,
    "algorithm.training_batch_size_per_gpu": 4,
    "data.rollout_batch_size": 2,
    "data.arithmetic.num_problems": 64,
    "rollout.model.precision": "fp32",
    "actor.optim.lr_scheduler": "constant",
}


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    options, overrides = parser.parse_known_args()
    settings = {**SETTINGS, **dict(override.split("=", 1) for override in overrides)}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        model = _random_model.save("smollm2-135m", Path(scratch, "model"), words=True)
        shapes = [parameter.shape for parameter in _random_model.make("smollm2-135m").parameters()]
        settings |= {"actor.model.model_path": model, "actor.tokenizer.tokenizer_model": model}
        dtype = DTYPES[str(settings["rollout.model.precision"])]
        num_bytes = sum(shape.numel() for shape in shapes) * dtype.itemsize
        row = Row("6", "weights of 135M parameters, published", "one copy in memory, one thread", goal=3.0)
        in_turn(row, lambda: published(Path(scratch, "run"), settings), lambda: copied(shapes, dtype), options.rounds)
    row.details = {
        "bytes": f"{num_bytes / 1e6:.0f} MB of {settings['rollout.model.precision']}",
        "GB/s": f"{num_bytes / statistics.median(row.ours) / 1e9:.2f} published, "
        f"{num_bytes / statistics.median(row.others) / 1e9:.2f} copied",
    }
    finish([row], options.out)


def published(directory: Path, settings: dict[str, object]) -> float:
    """Median seconds of a run's publications."""
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        own = Path(scratch, directory.name)
        with Run(own, settings) as run:
            run.wait()
        rows = [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["time/sync"] for row in rows[_SKIPPED:])


def copied(shapes: list[torch.Size], dtype: torch.dtype) -> float:
    """Median seconds of a copy of tensors to others that are there already."""
    source = [torch.ones(shape, dtype=dtype) for shape in shapes]
    target = [torch.ones(shape, dtype=dtype) for shape in shapes]
    seconds = []
    for _ in range(_STEPS):
        began = time.perf_counter()
        for theirs, mine in zip(target, source, strict=True):
            theirs.copy_(mine)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[_SKIPPED:])


if __name__ == "__main__":
    main()
