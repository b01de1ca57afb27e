"""The manifest: what makes a directory a checkpoint. Written last; lists every file with its size and sha256.

A person checks it with standard commands, in the checkpoint's directory:
``jq -r '.files | to_entries[] | "\\(.value.sha256)  \\(.key)"' manifest.json | sha256sum --check``
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from rlinf_lite.checkpoint.errors import DamagedCheckpoint, NoCheckpoint, UnsafeCheckpoint
from rlinf_lite.checkpoint.layout import MANIFEST, step_of

FORMAT = 1
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    size: int
    """Bytes."""
    sha256: str
    """Hex."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    step: int
    world_size: int
    """Ranks that wrote ``actor/``."""
    files: dict[str, FileRecord]
    """Every file of the checkpoint but the manifest, by its path inside."""
    info: dict[str, Any] = field(default_factory=dict)
    """What the caller wants to be known of the run: JSON values only."""

    def to_json(self) -> str:
        body = {"format": FORMAT, **asdict(self)}
        return json.dumps({**body, "digest": _digest(body)}, indent=1, sort_keys=True)


def _digest(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def hash_file(path: Path) -> FileRecord:
    """Size and sha256 of a file, read once."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size=size, sha256=digest.hexdigest())


def read(path: Path) -> Manifest:
    """Read the manifest of the checkpoint directory ``path`` and check it against itself.

    Raises:
        NoCheckpoint: there is none, so ``path`` was never committed.
        DamagedCheckpoint: it is not what was written, or belongs to another step.
        UnsafeCheckpoint: it names a file outside the directory.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise NoCheckpoint(f"{path}: no {MANIFEST}, so this was never committed as a checkpoint")
    try:
        body = json.loads(file.read_bytes())
        digest = body.pop("digest")
        found = body.pop("format")
        manifest = Manifest(
            step=body["step"],
            world_size=body["world_size"],
            files={name: FileRecord(**record) for name, record in body["files"].items()},
            info=body["info"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{file}: not a manifest ({type(error).__name__}: {error})") from None
    if found != FORMAT:
        raise DamagedCheckpoint(f"{file}: format {found!r}, this version reads {FORMAT}")
    if digest != _digest({"format": found, **body}):
        raise DamagedCheckpoint(f"{file}: was changed after it was written (its digest does not match)")
    _check_names(path, manifest)
    return manifest


def _check_names(path: Path, manifest: Manifest) -> None:
    claimed = step_of(path)
    if claimed is not None and claimed != manifest.step:
        raise DamagedCheckpoint(f"{path}: the directory says step {claimed}, its manifest says {manifest.step}")
    for name in manifest.files:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise UnsafeCheckpoint(f"{path / MANIFEST}: names {name!r}, outside of the checkpoint")


def verify(path: Path, manifest: Manifest, level: str) -> None:
    """Check every file of the checkpoint: ``full`` (size and sha256), ``size``, or ``off``.

    Raises:
        DamagedCheckpoint: names the first file that is missing, foreign or different, and how.
    """
    if level == "off":
        return
    present = {str(f.relative_to(path).as_posix()) for f in path.rglob("*") if not f.is_dir()} - {MANIFEST}
    if missing := sorted(manifest.files.keys() - present):
        raise DamagedCheckpoint(f"{path}: {missing[0]} is missing")
    if foreign := sorted(present - manifest.files.keys()):
        raise DamagedCheckpoint(f"{path}: {foreign[0]} is not in the manifest")
    for name, record in manifest.files.items():
        _verify_file(path / name, record, level)


def _verify_file(file: Path, record: FileRecord, level: str) -> None:
    if file.is_symlink():
        raise UnsafeCheckpoint(f"{file}: is a symbolic link")
    size = file.stat().st_size
    if size != record.size:
        raise DamagedCheckpoint(f"{file}: {size} bytes, the manifest says {record.size}")
    if level == "full" and hash_file(file).sha256 != record.sha256:
        raise DamagedCheckpoint(f"{file}: its sha256 is not the one in the manifest")
