"""The operations of the command line, as functions that return records: list, describe, verify, remove, pin."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from rlinf_lite.checkpoint import layout, storage
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.candidates import Candidates
from rlinf_lite.checkpoint.errors import CheckpointError, NoCheckpoint
from rlinf_lite.checkpoint.formats.section_content import Form, SectionContent, content_of
from rlinf_lite.checkpoint.identify import checkpoints_directory, is_checkpoint
from rlinf_lite.checkpoint.manifest import FileRecord, Manifest
from rlinf_lite.checkpoint.retention import metrics_of, readable
from rlinf_lite.checkpoint.storage import StoragePath

COMMITTED, DAMAGED, NO_MANIFEST = "committed", "damaged manifest", "no manifest"
LEFTOVERS = {
    "tmp": "unfinished save",
    "deleting": "half deleted",
    layout.SUPERSEDED: "superseded",
    layout.DAMAGED: "set aside as damaged",
}
"""What the suffix of a directory's name means."""
_SET_ASIDE = (LEFTOVERS[layout.SUPERSEDED], LEFTOVERS[layout.DAMAGED])
_ASIDE = re.compile(r"global_step_([0-9]+)\.(tmp|deleting|superseded|damaged)-[0-9a-f]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """One entry of a checkpoints directory."""

    path: StoragePath
    step: int
    state: str
    """``committed``, ``damaged manifest``, ``no manifest``, or one of `LEFTOVERS`."""
    reason: str | None = None
    """What is wrong with the manifest; None if nothing is."""
    num_bytes: int | None = None
    """The total in the manifest; None if it cannot be read."""
    saved_at: datetime | None = None
    """When the manifest was written; None if the storage does not record it."""
    num_ranks: Mapping[str, int] = field(default_factory=dict)
    """The number of ranks that wrote each section; empty if the manifest cannot be read."""
    pinned: bool = False
    in_use: bool = False
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """The tensors below one top-level key of a section's state (``model``, ``optim`` ...), or in files of one name."""

    num_tensors: int
    num_elements: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    found: Found
    files: Mapping[str, FileRecord]
    sections: Mapping[str, Mapping[str, Part]]
    """The parts of each section: ``{"actor": {"model": Part(...), "optim": Part(...)}}``."""
    info: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    path: StoragePath
    ok: bool
    reason: str | None
    """Why it does not verify; None if it does."""
    num_files: int
    num_bytes: int
    seconds: float


def list_root(where: StoragePath) -> list[Found]:
    """List everything in a directory of checkpoints, or of a run, that is or was a checkpoint; newest first.

    Raises:
        NoCheckpoint: there is no such directory.
        ValueError: it is a checkpoint itself.
    """
    root = checkpoints_directory(where)
    if is_checkpoint(root):
        raise ValueError(f"{root}: is a checkpoint, not a directory of them; use show, or give {root.parent}")
    found = [entry for path in root.iterdir() if (entry := look(path)) is not None]
    return sorted(found, key=lambda entry: (-entry.step, entry.path.name))


def look(path: StoragePath) -> Found | None:
    """Describe ``path`` by its name and manifest; None if it has nothing to do with checkpoints."""
    aside = _ASIDE.fullmatch(path.name)
    step = int(aside.group(1)) if aside else layout.step_of(path)
    if step is None or not path.is_dir():
        return None
    state = LEFTOVERS[aside.group(2)] if aside else COMMITTED
    try:
        return _found(path, manifests.read(path), state)
    except NoCheckpoint:
        state, reason = state if aside else NO_MANIFEST, None
    except CheckpointError as error:
        state, reason = state if aside else DAMAGED, str(error)
    return Found(path=path, step=step, state=state, reason=reason, pinned=layout.is_pinned(path))


def _found(path: StoragePath, manifest: Manifest, state: str) -> Found:
    return Found(
        path=path,
        step=manifest.step,
        state=state,
        num_bytes=sum(record.size for record in manifest.files.values()),
        saved_at=_modified(path / layout.MANIFEST),
        num_ranks={name: len(ranks) for name, ranks in manifest.ranks_of().items()},
        pinned=layout.is_pinned(path),
        in_use=storage.is_in_use(path / layout.MANIFEST),
        metrics=metrics_of(manifest),
    )


def _modified(file: StoragePath) -> datetime | None:
    seconds = file.stat().st_mtime
    return datetime.fromtimestamp(seconds).astimezone() if seconds else None


def describe(path: StoragePath) -> Description:
    """Describe what one checkpoint holds, without verifying its files.

    Raises:
        NoCheckpoint, DamagedCheckpoint, UnsafeCheckpoint: it is not a checkpoint, or cannot be read.
    """
    manifest = manifests.read(path)
    found = _found(path, manifest, COMMITTED)
    with storage.in_use(path / layout.MANIFEST):
        sections = {name: _parts(content_of(path, name, manifest)) for name in manifest.ranks_of()}
    return Description(found=found, files=manifest.files, sections=sections, info=manifest.info)


def _parts(content: SectionContent) -> dict[str, Part]:
    held: dict[str, list[Form]] = {}
    for name, form in sorted(content.forms().items()):
        if form is not None:
            held.setdefault(content.part_of(name), []).append(form)
    return {name: _part(forms) for name, forms in held.items()}


def _part(forms: Sequence[Form]) -> Part:
    return Part(
        num_tensors=len(forms),
        num_elements=sum(form.shape.numel() for form in forms),
        num_bytes=sum(form.num_bytes for form in forms),
    )


def to_verify(where: StoragePath) -> list[StoragePath]:
    """The checkpoint ``where``, or all committed ones in it if it is a directory of checkpoints.

    Raises:
        NoCheckpoint: there is none.
    """
    if is_checkpoint(where):
        return [where]
    root = checkpoints_directory(where)
    found = layout.committed(root)
    if not found:
        raise NoCheckpoint(f"{root}: holds no checkpoint")
    return found


def verify(path: StoragePath, level: str) -> Verified:
    """Verify the files of one checkpoint against its manifest; a failure is returned, not raised."""
    started = time.perf_counter()
    num_files, num_bytes, reason = 0, 0, None
    try:
        with storage.in_use(path / layout.MANIFEST):
            files = manifests.read_verified(path, level).files
        num_files, num_bytes = len(files), sum(record.size for record in files.values())
    except CheckpointError as error:
        reason = str(error)
    seconds = time.perf_counter() - started
    return Verified(
        path=path, ok=reason is None, reason=reason, num_files=num_files, num_bytes=num_bytes, seconds=seconds
    )


def remove(paths: Sequence[StoragePath], *, force: bool) -> Iterator[StoragePath]:
    """Delete checkpoints and leftovers, and yield each when it is deleted. If one is refused, none is deleted.

    Raises:
        ValueError: names each one that is refused, and why.
    """
    looked = [(path, look(path)) for path in dict.fromkeys(paths)]
    if refused := [f"{path} {why}" for path, found in looked if (why := _refusal(path, found, force)) is not None]:
        raise ValueError(f"nothing was removed: {'; '.join(refused)}")
    for path, found in looked:
        if found is not None and found.state in LEFTOVERS.values():
            storage.remove_tree(path)
        else:
            layout.delete(path)
            layout.pin_file(path).unlink(missing_ok=True)
        yield path


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruned:
    """What happened to one directory that was set aside."""

    path: StoragePath
    kept: str | None
    """Why it is kept; None if it is removed."""


def prune(where: StoragePath, *, force: bool = False, dry_run: bool = False) -> Iterator[Pruned]:
    """Remove what runs have set aside (superseded or damaged), and yield each one when it is removed or kept.

    One is kept while no committed checkpoint of its step or a later one verifies in full, because it may be the only
    good copy of that state. Pinned ones, and those in use, are kept too. It is safe to call while a run saves.

    Args:
        where: a directory of checkpoints, or of a run.
        force: do not look at other checkpoints.
        dry_run: decide, but remove nothing.

    Raises:
        NoCheckpoint: there is no such directory.
    """
    root = checkpoints_directory(where)
    aside = [found for path in root.iterdir() if (found := look(path)) is not None and found.state in _SET_ASIDE]
    newest = next((manifest.step for _, manifest in Candidates(root, "full")), -1) if aside and not force else -1
    for found in sorted(aside, key=lambda found: (found.step, found.path.name)):
        kept = "pinned" if found.pinned else "in use" if found.in_use else "a link" if found.path.is_symlink() else None
        if kept is None and not force and newest < found.step:
            kept = f"no checkpoint of step {found.step} or later verifies"
        if kept is None and not dry_run:
            storage.remove_tree(found.path)
        yield Pruned(path=found.path, kept=kept)


def _refusal(path: StoragePath, found: Found | None, force: bool) -> str | None:
    """Why ``path`` must not be removed; None if it may be."""
    if found is None:
        return "is neither a checkpoint nor a leftover of one"
    if path.is_symlink():
        return "is a link; remove the link itself, or what it leads to"
    if force:
        return None
    return next((f"{why}; --force removes it all the same" for why in _reasons_to_keep(path, found)), None)


def _reasons_to_keep(path: StoragePath, found: Found) -> Iterator[str]:
    if found.state == NO_MANIFEST:
        yield "has no manifest, so it is not a checkpoint of ours"
    if found.pinned:
        yield "is pinned"
    if found.in_use:
        yield "is in use"
    if path in _newest(path.parent):
        yield "is the newest checkpoint"


def _newest(root: StoragePath) -> list[StoragePath]:
    """The newest by name, and the newest that is readable; usually the same."""
    return layout.committed(root)[:1] + [path for path, _ in readable(root)[:1]]


def pin(path: StoragePath) -> None:
    """Pin a checkpoint, so that retention never deletes it.

    Raises:
        NoCheckpoint: ``path`` is not committed.
    """
    if path not in layout.committed(path.parent):
        raise NoCheckpoint(f"{path}: not a committed checkpoint")
    layout.pin_file(path).touch()
    storage.sync_dir(path.parent)


def unpin(path: StoragePath) -> None:
    """Remove a pin, if there is one."""
    layout.pin_file(path).unlink(missing_ok=True)
