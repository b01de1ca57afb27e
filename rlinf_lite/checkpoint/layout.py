"""Names in a directory of checkpoints: committed, set aside, pinned, or left over from a killed save."""

from __future__ import annotations

import re
import uuid

from rlinf_lite.checkpoint.storage import StoragePath, is_local, remove_tree

MANIFEST = "manifest.json"
ACTOR = "actor"
"""The section of the policy: the only one without a critic."""
DATA = "data/data.pt"
METADATA = ".metadata"
"""The file of a section that says where in its DCP shards each tensor is; a section in another layout has none."""
SECTION_NAME = r"[a-z][a-z0-9_]*"
"""What the name of a section matches; `DATA` has a directory of its own."""
SUPERSEDED, DAMAGED = "superseded", "damaged"
"""Why a checkpoint was set aside. Superseded: another one replaced it, or the run resumed from an earlier step."""
_STEP = re.compile(r"global_step_(0|[1-9][0-9]*)")
_LEFTOVER = re.compile(r"global_step_[0-9]+\.(tmp|deleting)-[0-9a-f]+")

_ASIDE = re.compile(rf"global_step_[0-9]+\.({SUPERSEDED}|{DAMAGED})-[0-9a-f]+")


def section_name(name: str) -> str:
    """``name``, if a section can have it.

    Raises:
        ValueError: it cannot.
    """
    if not re.fullmatch(SECTION_NAME, name) or name == DATA.split("/")[0]:
        raise ValueError(f"section={name!r}: use lower-case letters, digits and _, as in {ACTOR!r}; not 'data'")
    return name


def step_dir(root: StoragePath, step: int) -> StoragePath:
    """Where the checkpoint after ``step`` completed steps is committed."""
    return root / f"global_step_{step}"


def staging_dir(root: StoragePath, step: int) -> StoragePath:
    """Where a save writes: a temporary name that nothing reads, and that the next start removes if it is left over.

    Storage that cannot rename gets the final name, which is not a checkpoint until its manifest is there.
    """
    return root / f"global_step_{step}.tmp-{_token()}" if is_local(root) else step_dir(root, step)


def step_of(path: StoragePath) -> int | None:
    """The step that a committed name claims, or None for any other name."""
    match = _STEP.fullmatch(path.name)
    return int(match.group(1)) if match else None


def committed(root: StoragePath) -> list[StoragePath]:
    """All ``global_step_N`` directories in ``root``, newest first, without verifying them."""
    found = [(step, path) for path in _entries(root) if (step := step_of(path)) is not None and _is_committed(path)]
    return [path for _, path in sorted(found, key=lambda entry: entry[0], reverse=True)]


def _is_committed(path: StoragePath) -> bool:
    """On local storage only a commit gives such a name; elsewhere the manifest marks a commit."""
    return path.is_dir() and (is_local(path) or (path / MANIFEST).is_file())


def leftovers(root: StoragePath) -> list[StoragePath]:
    """What killed saves and interrupted deletions left in ``root``."""
    return sorted((path for path in _entries(root) if _is_leftover(path)), key=str)


def _entries(root: StoragePath) -> list[StoragePath]:
    return list(root.iterdir()) if root.is_dir() else []


def _is_leftover(path: StoragePath) -> bool:
    if not path.is_dir() or path.is_symlink():
        return False
    incomplete = not is_local(path) and step_of(path) is not None and not _is_committed(path)
    return incomplete or bool(_LEFTOVER.fullmatch(path.name))


def set_aside_in(root: StoragePath) -> list[StoragePath]:
    """The directories in ``root`` that `set_aside` renamed, sorted by name."""
    return sorted((path for path in _entries(root) if _ASIDE.fullmatch(path.name) and path.is_dir()), key=str)


def sweep(root: StoragePath) -> list[StoragePath]:
    """Remove `leftovers` and return them. Only the one process that saves to ``root`` may call this."""
    found = leftovers(root)
    for path in found:
        remove_tree(path)
    return found


def set_aside(path: StoragePath, why: str = SUPERSEDED) -> StoragePath:
    """Rename a committed directory, which frees its name and loses nothing; its pin moves with it.

    Args:
        why: `SUPERSEDED`, or `DAMAGED` if it did not verify.
    """
    target = path.with_name(f"{path.name}.{why}-{_token()}")
    _move(path, target)
    return target


def put_back(aside: StoragePath, path: StoragePath) -> None:
    """Undo `set_aside`."""
    _move(aside, path)


def _move(source: StoragePath, target: StoragePath) -> None:
    """Rename a directory and its pin. The new pin is made first, so that a kill loses no pin."""
    if is_pinned(source):
        pin_file(target).touch()
    if is_local(source):
        source.rename(target)
    else:
        _copy(source, target)
        delete(source)
    pin_file(source).unlink(missing_ok=True)


def delete(path: StoragePath) -> None:
    """Remove a committed directory; at no instant does a half-deleted one look like a checkpoint."""
    if is_local(path):
        doomed = path.with_name(f"{path.name}.deleting-{_token()}")
        path.rename(doomed)
        remove_tree(doomed)
    else:
        (path / MANIFEST).unlink(missing_ok=True)
        remove_tree(path)


def _copy(source: StoragePath, target: StoragePath) -> None:
    """Copy a directory within its storage, its manifest last."""
    files = [file for file in source.rglob("*") if file.is_file()]
    for file in sorted(files, key=lambda file: file == source / MANIFEST):
        copy = target / file.relative_to(source).as_posix()
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.fs.copy(file.path, copy.path)  # type: ignore[attr-defined]


def pin_file(path: StoragePath) -> StoragePath:
    """The file whose presence pins a checkpoint; beside it, because a committed directory is never written to."""
    return path.with_name(f"{path.name}.pinned")


def is_pinned(path: StoragePath) -> bool:
    """Whether ``path`` is pinned, so that no rule deletes it."""
    return pin_file(path).exists()


def _token() -> str:
    return uuid.uuid4().hex[:8]
