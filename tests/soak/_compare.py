"""Compares two runs bit by bit: every checkpoint, metric row and token; and describes what differs."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlinf_lite.checkpoint import CheckpointError, layout
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.cli.compare import compare
from rlinf_lite.checkpoint.formats.read_state import tensor_names

_RNG = re.compile(r"(?:^|\W)rng\.rank\d")
_SECONDS = ("time/", "throughput/", "memory/", "save/")


def differences(reference: Path, run: Path, last_step: int, *, same_ranks: bool = True) -> list[str]:
    """Describe how ``run`` differs from ``reference``. Empty if parameters, optimizer and RNG state, counters, metric
    rows, prompts and tokens are bit-equal, and no step is missing, repeated or beyond ``last_step``.

    Args:
        reference: directory of a run with a checkpoint of every step that ``run`` saved.
        run: directory of the other run.
        same_ranks: False: the RNG states, which each rank saves and no number comes from, are not compared.
    """
    try:
        return list(_differences(reference, run, last_step, same_ranks))
    except (CheckpointError, OSError, ValueError) as error:
        return [f"cannot be compared: {type(error).__name__}: {error}"]


def _differences(reference: Path, run: Path, last_step: int, same_ranks: bool) -> Iterator[str]:
    yield from _checkpoints(reference / "checkpoints", run / "checkpoints", last_step, same_ranks)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        yield from _rows(reference / name, run / name, last_step)


def _checkpoints(reference: Path, run: Path, last_step: int, same_ranks: bool) -> Iterator[str]:
    saved = sorted(layout.step_of(path) or 0 for path in layout.committed(run))
    if last_step not in saved:
        yield f"there is no checkpoint of step {last_step}, only of {saved}"
    if left := layout.leftovers(run):
        yield f"unfinished saves are left: {', '.join(path.name for path in left)}"
    for step in saved:
        yield from _checkpoint(layout.step_dir(reference, step), layout.step_dir(run, step), same_ranks)


def _checkpoint(reference: Path, run: Path, same_ranks: bool) -> Iterator[str]:
    for section in manifests.read(reference).ranks_of():
        names = tensor_names(reference / section)
        assert any(name.endswith("exp_avg_sq") for name in names) and any(name.startswith("rng.") for name in names)
    manifests.verify(run, manifests.read(run), "full")
    found = compare(reference, run)
    tensors = [each for each in found.tensors if same_ranks or not _RNG.search(each.name)]
    forms = [each for each in found.forms if same_ranks or not _RNG.search(each.name)]
    yield from (f"{run.name}: {each.name} ({each.num_different} of {each.num_elements} elements)" for each in tensors)
    for each in (*forms, *found.data):
        yield f"{run.name}: {each.name} is {each.b}, was {each.a}"


def _rows(reference: Path, run: Path, last_step: int) -> Iterator[str]:
    ours, theirs = _by_step(reference), _by_step(run)
    if list(theirs) != list(range(1, last_step + 1)):
        yield f"{run.name}: holds steps {list(theirs)}"
    for step in sorted(ours.keys() & theirs.keys()):
        if len(ours[step]) != len(theirs[step]):
            yield f"{run.name}: step {step} has {len(theirs[step])} rows, was {len(ours[step])}"
        elif keys := {key for a, b in zip(ours[step], theirs[step], strict=True) for key in _different_keys(a, b)}:
            yield f"{run.name}: step {step}: {', '.join(sorted(keys))}"


def _by_step(path: Path) -> dict[int, list[dict[str, Any]]]:
    """Rows of each step in the order of the file; a step's rows stand together."""
    steps: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for line in path.read_text().splitlines() if path.exists() else ():
        row = {key: value for key, value in json.loads(line).items() if not key.startswith(_SECONDS)}
        step = row.pop("step")
        if step in steps and step != next(reversed(steps)):
            raise ValueError(f"{path.name}: rows of step {step} after those of step {next(reversed(steps))}")
        steps[step].append(row)
    return steps


def _different_keys(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    # As JSON text, in which a NaN equals itself and 0.0 is not -0.0.
    return {key for key in a.keys() | b.keys() if json.dumps(a.get(key)) != json.dumps(b.get(key))}
