"""Which checkpoints to keep: a small policy object, and a pass over a directory that deletes the others.

Decisions depend only on what is on the disk (names, manifests, pins), so a restarted run decides the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from rlinf_lite.checkpoint import layout
from rlinf_lite.checkpoint.candidates import Candidates
from rlinf_lite.checkpoint.manifest import Manifest
from rlinf_lite.checkpoint.storage import StoragePath, absolute, is_in_use

METRICS = "metrics"
"""Key of a manifest's ``info`` for the metrics of the checkpoint's step: ``{name: number}``."""
MODES = ("max", "min")


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepBest:
    """The ``n`` checkpoints with the best value of one metric."""

    metric: str
    """A name in ``metrics`` of the manifest's ``info``. Checkpoints without it, or with NaN, are not candidates."""
    mode: str = "max"
    """``max`` or ``min``: whether large or small values are good."""
    n: int = 1

    def __post_init__(self) -> None:
        if not self.metric:
            raise ValueError(
                f"keep_best.metric={self.metric!r}: give the name of a metric that is saved with checkpoints"
            )
        if self.mode not in MODES:
            raise ValueError(f"keep_best.mode={self.mode!r}: one of {', '.join(MODES)}")
        _check_count("keep_best.n", self.n, "leave keep_best out to disable this rule")


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """Keeps a checkpoint if any of the rules keeps it. Without a rule, all are kept.

    A rule without a candidate in the whole directory deletes nothing; `RetentionReport.idle` names it.

    The newest checkpoint, pinned ones and those that are being read now are always kept. A checkpoint without a
    readable manifest, or with a file that is missing or has another size, is neither deleted nor counted.
    """

    keep_last: int | None = None
    """How many of the newest to keep."""
    keep_every: int | None = None
    """Keep those whose step is a multiple of this."""
    keep_best: KeepBest | None = None

    def __post_init__(self) -> None:
        for name, value in (("keep_last", self.keep_last), ("keep_every", self.keep_every)):
            if value is not None:
                _check_count(name, value, "null to disable this rule")

    @property
    def keeps_all(self) -> bool:
        return self.keep_last is None and self.keep_every is None and self.keep_best is None


def _check_count(name: str, value: int, otherwise: str) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}={value!r}: give a whole number of at least 1, or {otherwise}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What the rules look at in one committed checkpoint."""

    step: int
    metrics: Mapping[str, Any]
    pinned: bool


def to_delete(entries: Collection[Entry], retention: Retention) -> list[int]:
    """The steps to delete, which no rule keeps; oldest first."""
    if retention.keeps_all:
        return []
    steps = sorted(entry.step for entry in entries)
    by_rule = kept_by(entries, retention)
    if not any(by_rule.values()):
        return []
    kept = {entry.step for entry in entries if entry.pinned}.union(steps[-1:], *by_rule.values())
    return [step for step in steps if step not in kept]


def kept_by(entries: Collection[Entry], retention: Retention) -> dict[str, set[int]]:
    """The steps that each rule keeps; empty for a rule that has no candidate."""
    steps, kept = sorted(entry.step for entry in entries), {}
    if retention.keep_last is not None:
        kept["keep_last"] = set(steps[-retention.keep_last :])
    if retention.keep_every is not None:
        kept["keep_every"] = {step for step in steps if step % retention.keep_every == 0}
    if retention.keep_best is not None:
        kept["keep_best"] = best(entries, retention.keep_best)
    return kept


def idle_rules(entries: Collection[Entry], retention: Retention) -> list[str]:
    """A message for each rule that has no candidate among several checkpoints."""
    idle = [name for name, kept in kept_by(entries, retention).items() if not kept]
    missing = {
        "keep_every": f"none of the {len(entries)} checkpoints is of a multiple of {retention.keep_every} steps",
        "keep_best": f"none of the {len(entries)} checkpoints has a number for {_metric(retention)}",
    }
    return [f"{name}: {missing[name]}, so this rule deletes nothing yet" for name in idle] if len(entries) > 1 else []


def _metric(retention: Retention) -> str:
    return "" if retention.keep_best is None else retention.keep_best.metric


def best(entries: Collection[Entry], rule: KeepBest) -> set[int]:
    """The steps of the ``rule.n`` best checkpoints; among equals the oldest."""
    sign = -1 if rule.mode == "max" else 1
    found = [(entry.step, value) for entry in entries if (value := _number(entry.metrics.get(rule.metric))) is not None]
    return {step for step, _ in sorted(found, key=lambda pair: (sign * pair[1], pair[0]))[: rule.n]}


def _number(value: Any) -> float | None:
    """A number that can be compared; None for NaN and anything that is not a number."""
    return value if type(value) in (int, float) and value == value else None


@dataclass(frozen=True, kw_only=True, slots=True)
class RetentionReport:
    removed: tuple[StoragePath, ...] = ()
    problems: tuple[str, ...] = ()
    """Deletions that failed, each with its path and reason."""
    idle: tuple[str, ...] = ()
    """Rules without a candidate, each with its name and what is missing."""


def apply(root: StoragePath, retention: Retention, *, protect: Collection[StoragePath] = ()) -> RetentionReport:
    """Delete the checkpoints in ``root`` that ``retention`` does not keep. Call it after each commit.

    A checkpoint in use is kept until a later call. An `OSError` is reported and not raised, because it must not stop a
    run whose checkpoint was just saved.

    Args:
        root: the directory of checkpoints.
        retention: what to keep.
        protect: never deleted, such as the checkpoint just saved.
    """
    if retention.keeps_all:
        return RetentionReport()
    try:
        found = readable(root)
    except OSError as error:
        return RetentionReport(problems=(f"{root}: its checkpoints cannot be listed ({_reason(error)})",))
    spared = {str(absolute(path)) for path in protect}
    removed, problems = [], []
    entries = [entry for _, entry in found]
    for step in to_delete(entries, retention):
        path = layout.step_dir(root, step)
        try:
            if str(absolute(path)) not in spared and _delete_unless_held(path):
                removed.append(path)
        except OSError as error:
            problems.append(f"{path}: could not be deleted ({_reason(error)})")
    idle = tuple(idle_rules(entries, retention))
    return RetentionReport(removed=tuple(removed), problems=tuple(problems), idle=idle)


def readable(root: StoragePath) -> list[tuple[StoragePath, Entry]]:
    """The committed checkpoints in ``root`` whose files have the sizes in their manifest, newest first.

    Raises:
        OSError: ``root`` cannot be listed.
    """
    return [
        (path, Entry(step=manifest.step, metrics=metrics_of(manifest), pinned=layout.is_pinned(path)))
        for path, manifest in Candidates(root, "size")
    ]


def metrics_of(manifest: Manifest) -> dict[str, Any]:
    """The metrics saved with a checkpoint; empty if there are none."""
    metrics = manifest.info.get(METRICS)
    return metrics if isinstance(metrics, dict) else {}


def _delete_unless_held(path: StoragePath) -> bool:
    """Delete a checkpoint unless it is in use; returns whether it was deleted. The user's symbolic links are kept."""
    if path.is_symlink() or is_in_use(path / layout.MANIFEST):
        return False
    layout.delete(path)
    return True


def _reason(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"
