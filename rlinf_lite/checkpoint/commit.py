"""The commit protocol: write to a temporary directory, fsync it, write the manifest last, rename, fsync the parent.

Storage that cannot rename (see `storage.is_local`) gets the files under their final name; there the manifest is the
commit marker, and a directory without one is not a checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePosixPath

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
    """Where an older checkpoint of the same name was moved to before this save began; None if there was none, or on
    local storage, where that happens at the commit."""


def open_stage(root: StoragePath, step: int, sections: Collection[str]) -> Stage:
    """Make the directories that a save writes to: one per section, and that of `layout.DATA`."""
    if not root.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        sync_dir(root.parent)
    superseded = None if is_local(root) else _clear(layout.step_dir(root, step))
    stage = layout.staging_dir(root, step)
    for name in sections:
        (stage / name).mkdir(parents=True, exist_ok=True)
    (stage / layout.DATA).parent.mkdir(exist_ok=True)
    return Stage(path=stage, superseded=superseded)


def _clear(final: StoragePath) -> StoragePath | None:
    """Free a name that will be written to directly: set a checkpoint aside, remove an incomplete one."""
    if (final / layout.MANIFEST).is_file():
        return layout.set_aside(final)
    if final.is_dir():
        remove_tree(final)
    return None


def commit(root: StoragePath, stage: Stage, manifest: Manifest) -> StoragePath | None:
    """Turn a complete stage into a checkpoint. Returns where an older directory of the same name was moved to.

    Raises:
        OSError: nothing was committed, and an older directory of the same name is back in its place.
    """
    step, path = manifest.step, stage.path
    for directory in directories_of(manifest):
        sync_dir(path / directory)
    faults.reach("save.manifest", step=step, path=str(path))
    write_durably(path / layout.MANIFEST, manifest.to_json().encode())
    if not is_local(root):
        return stage.superseded
    sync_dir(path)
    return _rename(root, step, path)


def directories_of(manifest: Manifest) -> list[str]:
    """Every directory in a checkpoint that holds a file or a directory, deepest first, without the checkpoint's own."""
    found = {str(parent) for name in manifest.files for parent in PurePosixPath(name).parents} | {*manifest.ranks_of()}
    return sorted(found - {"."}, key=lambda name: (-name.count("/"), name))


def _rename(root: StoragePath, step: int, stage: StoragePath) -> StoragePath | None:
    """Rename ``stage``. Set a directory that has the name aside, and put it back if this fails."""
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
    """Remove what a failed save wrote, and put back an older checkpoint that it replaced, as far as storage permits.

    Without a rename the stage may already be committed even though some ranks missed it; then it stays.
    """
    if not is_local(stage.path) and (stage.path / layout.MANIFEST).is_file():
        return
    remove_tree(stage.path, quietly=True)
    if stage.superseded is not None and not is_local(stage.path):
        layout.put_back(stage.superseded, stage.path)
