"""Names in a checkpoints folder: what is committed, what is aside, what is left over from a kill."""

from __future__ import annotations

import re
import shutil
import uuid
from pathlib import Path

MANIFEST = "manifest.json"
ACTOR = "actor"
DATA = "data/data.pt"
_STEP = re.compile(r"global_step_(0|[1-9][0-9]*)")
_LEFTOVER = re.compile(r"global_step_[0-9]+\.tmp-[0-9a-f]+")


def step_dir(root: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` completed steps is committed."""
    return root / f"global_step_{step}"


def staging_dir(root: Path, step: int) -> Path:
    """A new name aside. Nothing reads it, the next start sweeps it."""
    return root / f"global_step_{step}.tmp-{uuid.uuid4().hex[:8]}"


def step_of(path: Path) -> int | None:
    """The step that a committed name claims, or None for any other name."""
    match = _STEP.fullmatch(path.name)
    return int(match.group(1)) if match else None


def committed(root: Path) -> list[Path]:
    """All ``global_step_N`` directories in ``root``, newest first. Whether they verify is not looked at."""
    if not root.is_dir():
        return []
    found = [(step, path) for path in root.iterdir() if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def sweep(root: Path) -> list[Path]:
    """Remove what killed saves left aside. Only one process may own ``root``. Returns what was removed."""
    if not root.is_dir():
        return []
    leftovers = sorted(path for path in root.iterdir() if _is_leftover(path))
    for path in leftovers:
        shutil.rmtree(path)
    return leftovers


def _is_leftover(path: Path) -> bool:
    return bool(_LEFTOVER.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()


def set_aside(path: Path) -> Path:
    """Rename a committed directory so that its name is free and nothing of it is lost."""
    aside = path.with_name(f"{path.name}.superseded-{uuid.uuid4().hex[:8]}")
    path.rename(aside)
    return aside
