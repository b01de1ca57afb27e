"""Names in a checkpoints directory: what is committed, what is aside, what is left over from a kill."""

from __future__ import annotations

import re
import uuid

from rlinf_lite.checkpoint.storage import StoragePath, is_local, remove_tree

MANIFEST = "manifest.json"
ACTOR = "actor"
DATA = "data/data.pt"
SUPERSEDED, DAMAGED = "superseded", "damaged"
"""Why a checkpoint was set aside: another one took its place, or the run went back before it; it did not verify."""
_STEP = re.compile(r"global_step_(0|[1-9][0-9]*)")
_LEFTOVER = re.compile(r"global_step_[0-9]+\.(tmp|deleting)-[0-9a-f]+")

_ASIDE = re.compile(rf"global_step_[0-9]+\.({SUPERSEDED}|{DAMAGED})-[0-9a-f]+")


def step_dir(root: StoragePath, step: int) -> StoragePath:
    """Where the checkpoint after ``step`` completed steps is committed."""
    return root / f"global_step_{step}"


def staging_dir(root: StoragePath, step: int) -> StoragePath:
    """Where a save writes: aside, under a new name that nothing reads and the next start sweeps.

    Storage that cannot rename has no aside: there the final name, which is no checkpoint before its manifest is there.
    """
    return root / f"global_step_{step}.tmp-{_token()}" if is_local(root) else step_dir(root, step)


def step_of(path: StoragePath) -> int | None:
    """The step that a committed name claims, or None for any other name."""
    match = _STEP.fullmatch(path.name)
    return int(match.group(1)) if match else None


def committed(root: StoragePath) -> list[StoragePath]:
    """All ``global_step_N`` directories in ``root``, newest first. Whether they verify is not looked at."""
    found = [(step, path) for path in _entries(root) if (step := step_of(path)) is not None and _is_committed(path)]
    return [path for _, path in sorted(found, key=lambda entry: entry[0], reverse=True)]


def _is_committed(path: StoragePath) -> bool:
    """The name says so where a rename gave it; elsewhere the manifest does."""
    return path.is_dir() and (is_local(path) or (path / MANIFEST).is_file())


def leftovers(root: StoragePath) -> list[StoragePath]:
    """What killed saves and half-done deletions left."""
    return sorted((path for path in _entries(root) if _is_leftover(path)), key=str)


def _entries(root: StoragePath) -> list[StoragePath]:
    return list(root.iterdir()) if root.is_dir() else []


def _is_leftover(path: StoragePath) -> bool:
    if not path.is_dir() or path.is_symlink():
        return False
    torso = not is_local(path) and step_of(path) is not None and not _is_committed(path)
    return torso or bool(_LEFTOVER.fullmatch(path.name))


def set_aside_in(root: StoragePath) -> list[StoragePath]:
    """What `set_aside` left in ``root``, by name."""
    return sorted((path for path in _entries(root) if _ASIDE.fullmatch(path.name) and path.is_dir()), key=str)


def sweep(root: StoragePath) -> list[StoragePath]:
    """Remove `leftovers`. Only one process may own ``root``. Returns what was removed."""
    found = leftovers(root)
    for path in found:
        remove_tree(path)
    return found


def set_aside(path: StoragePath, why: str = SUPERSEDED) -> StoragePath:
    """Rename a committed directory so that its name is free and nothing of it is lost; its pin goes with it.

    Args:
        why: `SUPERSEDED`, or `DAMAGED` for one that did not verify.
    """
    aside = path.with_name(f"{path.name}.{why}-{_token()}")
    _move(path, aside)
    return aside


def put_back(aside: StoragePath, path: StoragePath) -> None:
    """Undo `set_aside`."""
    _move(aside, path)


def _move(source: StoragePath, target: StoragePath) -> None:
    """Rename a directory. Its pin is there before it and goes after it: a kill in between leaves one too many."""
    if is_pinned(source):
        pin_file(target).touch()
    if is_local(source):
        source.rename(target)
    else:
        _copy(source, target)
        delete(source)
    pin_file(source).unlink(missing_ok=True)


def delete(path: StoragePath) -> None:
    """Remove a committed directory, so that at no instant half of it looks like a checkpoint."""
    if is_local(path):
        doomed = path.with_name(f"{path.name}.deleting-{_token()}")
        path.rename(doomed)
        remove_tree(doomed)
    else:
        (path / MANIFEST).unlink(missing_ok=True)
        remove_tree(path)


def _copy(source: StoragePath, target: StoragePath) -> None:
    """Copy a directory within its storage, the manifest last."""
    files = [file for file in source.rglob("*") if file.is_file()]
    for file in sorted(files, key=lambda file: file == source / MANIFEST):
        copy = target / file.relative_to(source).as_posix()
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.fs.copy(file.path, copy.path)  # type: ignore[attr-defined]


def pin_file(path: StoragePath) -> StoragePath:
    """Whose presence keeps a checkpoint for ever. Beside it: a committed directory is not written to."""
    return path.with_name(f"{path.name}.pinned")


def is_pinned(path: StoragePath) -> bool:
    """Whether ``path`` is kept for ever."""
    return pin_file(path).exists()


def _token() -> str:
    return uuid.uuid4().hex[:8]
