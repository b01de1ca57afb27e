"""What to keep: a small policy object, and one pass over a checkpoints directory that deletes the rest.

Decided from what lies on the disk (names, manifests, pins) and nothing else, so that a restart decides alike.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from rlinf_lite.checkpoint import layout
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.errors import CheckpointError
from rlinf_lite.checkpoint.storage import StoragePath, absolute, is_in_use

METRICS = "metrics"
"""Key of a manifest's ``info`` under which the metrics of the checkpoint's step are: ``{name: number}``."""
MODES = ("max", "min")


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepBest:
    """The ``n`` checkpoints with the best value of one metric."""

    metric: str
    """A name in ``metrics`` of the manifest's ``info``. Checkpoints without it, or where it is NaN, are no
    candidates."""
    mode: str = "max"
    """``max`` or ``min``: which values are good."""
    n: int = 1

    def __post_init__(self) -> None:
        if not self.metric:
            raise ValueError(
                f"keep_best.metric={self.metric!r}: give the name of a metric that is saved with checkpoints"
            )
        if self.mode not in MODES:
            raise ValueError(f"keep_best.mode={self.mode!r}: one of {', '.join(MODES)}")
        _check_count("keep_best.n", self.n, "leave keep_best out to have no such rule")


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """A checkpoint is kept if any of the rules keeps it. With no rule, all are kept.

    A rule that has no candidate in the whole directory counts as not set: what it was meant to keep cannot be told
    apart, so it is no reason to delete anything. `RetentionReport.idle` names it.

    Whatever the rules: the newest and pinned ones are kept, so are those that somebody reads now. What has no readable
    manifest, or a file that is missing or of another size, is neither deleted nor counted.
    """

    keep_last: int | None = None
    """The newest so many."""
    keep_every: int | None = None
    """Those whose step is a multiple of it."""
    keep_best: KeepBest | None = None

    def __post_init__(self) -> None:
        for name, value in (("keep_last", self.keep_last), ("keep_every", self.keep_every)):
            if value is not None:
                _check_count(name, value, "null to have no such rule")

    @property
    def keeps_all(self) -> bool:
        return self.keep_last is None and self.keep_every is None and self.keep_best is None


def _check_count(name: str, value: int, otherwise: str) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}={value!r}: give a whole number of at least 1, or {otherwise}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What a decision about one committed checkpoint needs to know."""

    step: int
    metrics: Mapping[str, Any]
    pinned: bool


def to_delete(entries: Collection[Entry], retention: Retention) -> list[int]:
    """The steps that no rule keeps, oldest first."""
    if retention.keeps_all:
        return []
    steps = sorted(entry.step for entry in entries)
    by_rule = kept_by(entries, retention)
    if not any(by_rule.values()):
        return []
    kept = {entry.step for entry in entries if entry.pinned}.union(steps[-1:], *by_rule.values())
    return [step for step in steps if step not in kept]


def kept_by(entries: Collection[Entry], retention: Retention) -> dict[str, set[int]]:
    """The steps that each of the given rules keeps; none: it has no candidate."""
    steps, kept = sorted(entry.step for entry in entries), {}
    if retention.keep_last is not None:
        kept["keep_last"] = set(steps[-retention.keep_last :])
    if retention.keep_every is not None:
        kept["keep_every"] = {step for step in steps if step % retention.keep_every == 0}
    if retention.keep_best is not None:
        kept["keep_best"] = best(entries, retention.keep_best)
    return kept


def idle_rules(entries: Collection[Entry], retention: Retention) -> list[str]:
    """What to tell of each rule that has no candidate among several checkpoints."""
    idle = [name for name, kept in kept_by(entries, retention).items() if not kept]
    missing = {
        "keep_every": f"none of the {len(entries)} checkpoints is of a multiple of {retention.keep_every} steps",
        "keep_best": f"none of the {len(entries)} checkpoints has a number for {_metric(retention)}",
    }
    return [f"{name}: {missing[name]}, so this rule deletes nothing yet" for name in idle] if len(entries) > 1 else []


def _metric(retention: Retention) -> str:
    return "" if retention.keep_best is None else retention.keep_best.metric


def best(entries: Collection[Entry], rule: KeepBest) -> set[int]:
    """The steps of the best ones; of equals, the oldest first."""
    sign = -1 if rule.mode == "max" else 1
    found = [(entry.step, value) for entry in entries if (value := _number(entry.metrics.get(rule.metric))) is not None]
    return {step for step, _ in sorted(found, key=lambda pair: (sign * pair[1], pair[0]))[: rule.n]}


def _number(value: Any) -> float | None:
    """A number that can be compared, or None for what is none."""
    return value if type(value) in (int, float) and value == value else None


@dataclass(frozen=True, kw_only=True, slots=True)
class RetentionReport:
    removed: tuple[StoragePath, ...] = ()
    problems: tuple[str, ...] = ()
    """What should have been deleted and was not, each with its path and reason."""
    idle: tuple[str, ...] = ()
    """Rules without a candidate, each with its name and what is missing."""


def apply(root: StoragePath, retention: Retention, *, protect: Collection[StoragePath] = ()) -> RetentionReport:
    """Delete the checkpoints in ``root`` that ``retention`` does not keep. Call it when a new one is committed.

    One that is in use stays, and is asked for again at the next call. An `OSError` is no reason to stop a run whose
    checkpoint was just saved: it is reported, not raised.

    Args:
        root: the checkpoints directory.
        retention: what to keep.
        protect: never deleted, such as the one just saved and the one that the run was started from.
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
            problems.append(f"{path}: was to be deleted, and could not be ({_reason(error)})")
    idle = tuple(idle_rules(entries, retention))
    return RetentionReport(removed=tuple(removed), problems=tuple(problems), idle=idle)


def readable(root: StoragePath) -> list[tuple[StoragePath, Entry]]:
    """The committed checkpoints in ``root`` whose files have the sizes that their manifest says, newest first.

    Raises:
        OSError: ``root`` cannot be listed.
    """
    found = []
    for path in layout.committed(root):
        try:
            manifest = manifests.read_verified(path, "size")
        except CheckpointError:
            continue
        found.append((path, Entry(step=manifest.step, metrics=metrics_of(manifest), pinned=layout.is_pinned(path))))
    return found


def metrics_of(manifest: manifests.Manifest) -> dict[str, Any]:
    """The metrics saved with a checkpoint; empty if there are none."""
    metrics = manifest.info.get(METRICS)
    return metrics if isinstance(metrics, dict) else {}


def _delete_unless_held(path: StoragePath) -> bool:
    """Whether it was deleted. A link to a checkpoint elsewhere is somebody's deliberate arrangement, and stays."""
    if path.is_symlink() or is_in_use(path / layout.MANIFEST):
        return False
    layout.delete(path)
    return True


def _reason(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"
