"""Which checkpoint a run starts from: what ``runner.resume_dir`` asks for, checked against what is on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlinf_lite.checkpoint import layout
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.candidates import Candidates
from rlinf_lite.checkpoint.errors import DamagedCheckpoint, NoCheckpoint, WouldStartFresh
from rlinf_lite.checkpoint.formats.data_file import read_data
from rlinf_lite.checkpoint.identify import instead_of, linked
from rlinf_lite.checkpoint.manifest import Manifest
from rlinf_lite.checkpoint.storage import StoragePath, storage_path

AUTO = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    path: StoragePath | None
    """None for a fresh start."""
    manifest: Manifest | None
    """None for a fresh start."""
    data: dict[str, Any]
    """What ``data/data.pt`` holds."""
    damaged: Mapping[StoragePath, str] = field(default_factory=dict)
    """Newer checkpoints that were stepped over, each with the reason."""

    @property
    def skipped(self) -> tuple[str, ...]:
        """The reasons in `damaged`."""
        return tuple(self.damaged.values())


_FRESH = Selection(path=None, manifest=None, data={})


def select(
    resume_dir: str | None, root: StoragePath, *, verify: str, damaged: Mapping[StoragePath, str] | None = None
) -> Selection:
    """Find the checkpoint to resume from.

    Args:
        resume_dir: None for a new run, a ``global_step_N`` directory, or ``auto`` for the newest that verifies.
        root: the run's own directory of checkpoints.
        verify: ``full``, ``size`` or ``off``.
        damaged: checkpoints that ``auto`` does not consider, with the reason; an error does not repeat them.

    Raises:
        WouldStartFresh: a new run was asked for, but ``root`` holds checkpoints.
        NoCheckpoint: the given path is not a checkpoint.
        DamagedCheckpoint: the given path does not verify, or none in ``root`` does with ``auto``.
    """
    if resume_dir == AUTO:
        return _newest(root, verify, damaged or {})
    if resume_dir is not None:
        return _given(resume_dir, verify)
    if existing := layout.committed(root):
        raise WouldStartFresh(
            f"runner.resume_dir=null asks for a new run, but {root} already holds {existing[0].name}"
            f"{f' and {len(existing) - 1} more' if len(existing) > 1 else ''}; "
            "resume with runner.resume_dir=auto, or choose another runner.experiment_name"
        )
    return _FRESH


def _newest(root: StoragePath, verify: str, known: Mapping[StoragePath, str]) -> Selection:
    candidates = Candidates(root, verify, known=known)
    for path, manifest in candidates:
        try:
            data = read_data(path)
        except DamagedCheckpoint as error:
            candidates.reject(path, error)
        else:
            return Selection(path=path, manifest=manifest, data=data, damaged={**known, **candidates.damaged})
    if candidates.paths:
        raise DamagedCheckpoint(f"runner.resume_dir=auto: {candidates.none_verifies()}")
    return _FRESH


def _given(resume_dir: str, verify: str) -> Selection:
    try:
        path = storage_path(resume_dir)
    except ValueError as error:
        raise NoCheckpoint(f"runner.resume_dir={error}") from None
    if not path.is_dir():
        near = layout.committed(path.parent)
        hint = f"; {path.parent} holds {', '.join(p.name for p in near)}" if near else ""
        raise NoCheckpoint(f"runner.resume_dir={path}: no such checkpoint{hint}")
    checkpoint = linked(path)
    if layout.step_of(checkpoint) is None:
        what = instead_of(checkpoint)
        raise NoCheckpoint(
            f"runner.resume_dir={path}: not a global_step_N directory; {f'it {what}' if what else 'give one, or auto'}"
        )
    manifest = manifests.read_verified(checkpoint, verify)
    return Selection(path=checkpoint, manifest=manifest, data=read_data(checkpoint))
