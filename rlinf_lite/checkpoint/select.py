"""Which checkpoint a run starts from: what ``resume_dir`` asks for, held against what is on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlinf_lite.checkpoint import layout
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.errors import CheckpointError, DamagedCheckpoint, NoCheckpoint, WouldStartFresh
from rlinf_lite.checkpoint.formats.data_file import read_data
from rlinf_lite.checkpoint.manifest import Manifest
from rlinf_lite.checkpoint.mistaken import instead_of, linked
from rlinf_lite.checkpoint.storage import StoragePath, storage_path

AUTO = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    path: StoragePath | None
    """None: a fresh start."""
    manifest: Manifest | None
    data: dict[str, Any]
    """What ``data/data.pt`` holds."""
    damaged: Mapping[StoragePath, str] = field(default_factory=dict)
    """Newer checkpoints that did not verify, each with its reason."""

    @property
    def skipped(self) -> tuple[str, ...]:
        """The reasons."""
        return tuple(self.damaged.values())


def select(
    resume_dir: str | None, root: StoragePath, *, verify: str, damaged: Mapping[StoragePath, str] | None = None
) -> Selection:
    """Find the checkpoint to go on from.

    Args:
        resume_dir: None for a new run, a ``global_step_N`` directory, or ``auto`` for the newest that verifies.
        root: the run's own checkpoints directory.
        verify: ``full``, ``size`` or ``off``.
        damaged: checkpoints already found damaged, with the reasons: not looked at again, nor named in an error.

    Raises:
        WouldStartFresh: a new run was asked for, but ``root`` holds checkpoints.
        NoCheckpoint: the given path is none.
        DamagedCheckpoint: the given path does not verify, or ``auto`` found only such ones.
    """
    existing = layout.committed(root)
    if resume_dir is None:
        if existing:
            raise WouldStartFresh(
                f"runner.resume_dir=null asks for a new run, but {root} already holds {existing[0].name}"
                f"{f' and {len(existing) - 1} more' if len(existing) > 1 else ''}; "
                "go on with runner.resume_dir=auto, or choose another runner.experiment_name"
            )
        return Selection(path=None, manifest=None, data={})
    if resume_dir == AUTO:
        return _newest_that_verifies(existing, root, verify, damaged or {})
    try:
        path = storage_path(resume_dir)
    except ValueError as error:
        raise NoCheckpoint(f"runner.resume_dir={error}") from None
    return _given(path, verify)


def _open(path: StoragePath, verify: str, damaged: Mapping[StoragePath, str] | None = None) -> Selection:
    """Raises as `manifest.read_verified` and `read_data`."""
    manifest = manifests.read_verified(path, verify)
    return Selection(path=path, manifest=manifest, data=read_data(path), damaged=damaged or {})


def _given(path: StoragePath, verify: str) -> Selection:
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
    return _open(checkpoint, verify)


def _newest_that_verifies(
    existing: list[StoragePath], root: StoragePath, verify: str, known: Mapping[StoragePath, str]
) -> Selection:
    found: dict[StoragePath, str] = {}
    for path in existing:
        if path in known:
            continue
        try:
            return _open(path, verify, {**known, **found})
        except CheckpointError as error:
            found[path] = str(error)
    if existing:
        reasons = "".join(f"\n  {reason}" for reason in found.values())
        named = " (others were named before, or are not looked at)" if known else ""
        raise DamagedCheckpoint(
            f"runner.resume_dir=auto: none of the {len(existing)} checkpoints in {root} verifies{named}"
            f"{':' if reasons else ''}{reasons}"
        )
    return Selection(path=None, manifest=None, data={})
