"""The commit protocol: aside, small files, directories durable, manifest last, the name, the parent durable.

Where nothing can be renamed (`storage.is_local` says no) the files are written under their final name, and the manifest
is the commit marker: a directory without one is no checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlinf_lite import faults
from rlinf_lite.checkpoint import layout
from rlinf_lite.checkpoint.files import write_durably
from rlinf_lite.checkpoint.manifest import Manifest
from rlinf_lite.checkpoint.storage import StoragePath, is_local, remove_tree, sync_dir


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Where a save writes before it is committed."""

    path: StoragePath
    superseded: StoragePath | None = None
    """Where a committed directory was moved whose name is needed before the commit (where nothing can be renamed)."""


def open_stage(root: StoragePath, step: int) -> Stage:
    """Make the directories of a save."""
    if not root.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        sync_dir(root.parent)
    superseded = None if is_local(root) else _clear(layout.step_dir(root, step))
    stage = layout.staging_dir(root, step)
    (stage / layout.ACTOR).mkdir(parents=True, exist_ok=True)
    (stage / layout.DATA).parent.mkdir(exist_ok=True)
    return Stage(path=stage, superseded=superseded)


def _clear(final: StoragePath) -> StoragePath | None:
    """Free a name that will be written to directly: a checkpoint is set aside, a torso removed."""
    if (final / layout.MANIFEST).is_file():
        return layout.set_aside(final)
    if final.is_dir():
        remove_tree(final)
    return None


def commit(root: StoragePath, stage: Stage, manifest: Manifest) -> StoragePath | None:
    """Make a whole stage a checkpoint. Returns where an older directory of the same name was moved to.

    Raises:
        OSError: nothing was committed, and what had the name has it still.
    """
    step, path = manifest.step, stage.path
    for directory in (path / layout.ACTOR, (path / layout.DATA).parent):
        sync_dir(directory)
    faults.reach("save.manifest", step=step, path=str(path))
    write_durably(path / layout.MANIFEST, manifest.to_json().encode())
    if not is_local(root):
        return stage.superseded
    sync_dir(path)
    return _rename(root, step, path)


def _rename(root: StoragePath, step: int, stage: StoragePath) -> StoragePath | None:
    """Give ``stage`` its name; what had that name is set aside, and gets it back if this fails."""
    final = layout.step_dir(root, step)
    superseded = layout.set_aside(final) if final.exists() else None
    try:
        faults.reach("save.rename", step=step, path=str(stage))
        stage.rename(final)
        sync_dir(root)
        faults.reach("save.committed", step=step, path=str(final))
    except OSError:
        if not stage.exists():
            final.rename(stage)
        if superseded:
            layout.put_back(superseded, final)
        raise
    return superseded


def abandon(stage: Stage) -> None:
    """Remove what a failed save wrote, and give back a name that was taken for it, as far as the storage lets us.

    Where nothing is renamed it may be a checkpoint by now, of whose commit some ranks did not hear: that stays.
    """
    if not is_local(stage.path) and (stage.path / layout.MANIFEST).is_file():
        return
    remove_tree(stage.path, quietly=True)
    if stage.superseded is not None and not is_local(stage.path):
        layout.put_back(stage.superseded, stage.path)
