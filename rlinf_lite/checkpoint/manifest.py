"""The manifest, which makes a directory a checkpoint: written last, lists every file with its size and BLAKE3 hash.

Other commands check it too, in the checkpoint's directory:
``jq -r '.files | to_entries[] | "\\(.value.blake3)  \\(.key)"' manifest.json | b3sum --check``

Manifests of format 1 have a sha256 instead.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from rlinf_lite import fingerprints
from rlinf_lite.checkpoint.errors import CheckpointError, DamagedCheckpoint, NoCheckpoint, UnsafeCheckpoint
from rlinf_lite.checkpoint.hashing import ALGORITHM, ALGORITHMS, hash_of_file
from rlinf_lite.checkpoint.identify import instead_of
from rlinf_lite.checkpoint.layout import ACTOR, MANIFEST, METADATA, section_name, step_of
from rlinf_lite.checkpoint.storage import StoragePath, is_local, read_file

FORMAT = 2
_FORMATS = (1, 2)
"""That can be read."""
LEVELS = ("full", "size", "off")
SAVE_ID = "save_id"
"""Key of ``info``: the id of the save that wrote the checkpoint. Two saves of the same state have different ids."""
LACKS_RNG = "lacks_rng"
"""Key of ``info``: True if the checkpoint was converted, so that no RNG state in it is that of a rank of the run."""
WRITTEN_BY = "written_by"
"""Key of ``info``: the program whose checkpoint this was, if it was not rlinf_lite's."""
CONVERTED_FROM = "converted_from"
"""Key of ``info``: the directory, and maybe the iteration in it, that another program wrote."""
_HASH_THREADS = min(8, os.cpu_count() or 1)
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    size: int
    """Bytes."""
    digest: str
    """The hash of its content, as hex."""
    algorithm: str = ALGORITHM
    """One of `hashing.ALGORITHMS`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    step: int
    world_size: int
    """Ranks that wrote ``actor/``; all ranks if there is no such section."""
    files: dict[str, FileRecord]
    """Every file of the checkpoint except the manifest, by its path in the checkpoint."""
    info: dict[str, Any] = field(default_factory=dict)
    """JSON values that describe the run, from the caller."""
    sections: dict[str, list[int]] = field(default_factory=dict)
    """The ranks that wrote each section; empty if ``actor/`` is the only one. Read it with `ranks_of`."""

    def ranks_of(self) -> dict[str, tuple[int, ...]]:
        """The ranks that wrote each section: ``{"actor": (0, 1), "critic": (2,)}``."""
        return {name: tuple(ranks) for name, ranks in self.sections.items()} or {ACTOR: tuple(range(self.world_size))}

    def has_shards(self, section: str = ACTOR) -> bool:
        """Whether a section consists of DCP shards, and not of files in a layout of their own."""
        return f"{section}/{METADATA}" in self.files

    def weights_fingerprint(self, section: str = ACTOR) -> str:
        """What identifies the content of a section: a hash of the names and hashes of its files."""
        return fingerprints.of_value(
            sorted((name, file.digest) for name, file in self.files.items() if name.startswith(f"{section}/"))
        )

    def to_json(self) -> str:
        # The digest covers what a reader will see: JSON turns a key 2 into "2" and a tuple into a list.
        files = {name: {"size": file.size, file.algorithm: file.digest} for name, file in self.files.items()}
        body = json.loads(json.dumps({"format": FORMAT, **asdict(self), "files": files}))
        if not self.sections:
            del body["sections"]  # as before there were sections
        return json.dumps({**body, "digest": _digest(body)}, indent=1, sort_keys=True)


def _digest(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return fingerprints.of_text(canonical)


def hash_file(path: StoragePath) -> FileRecord:
    """Size and hash of a file."""
    return FileRecord(size=path.stat().st_size, digest=hash_of_file(path))


def read(path: StoragePath) -> Manifest:
    """Read the manifest of the checkpoint directory ``path`` and check it against its own digest.

    Raises:
        NoCheckpoint: there is none, so ``path`` was never committed.
        DamagedCheckpoint: it was changed, belongs to another step, or cannot be read.
        UnsafeCheckpoint: it names a file outside the directory, or is a symbolic link.
    """
    file = path / MANIFEST
    try:
        if file.is_symlink():
            raise UnsafeCheckpoint(f"{file}: is a symbolic link")
        if not file.is_file():
            hint = instead_of(path)
            raise NoCheckpoint(
                f"{path}: no {MANIFEST}, so this was never committed as a checkpoint{f'; it {hint}' if hint else ''}"
            )
        manifest = _parse(json.loads(read_file(file)))
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{file}: not a manifest ({type(error).__name__}: {error})") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{file}: cannot be read ({error.strerror})") from None
    _check_names(path, manifest)
    return manifest


def _parse(body: dict[str, Any]) -> Manifest:
    """Raises ValueError, KeyError, TypeError or AttributeError for anything that is not a manifest."""
    digest = body.pop("digest")
    if body["format"] not in _FORMATS:
        raise ValueError(f"format {body['format']!r}, this version reads {' and '.join(map(str, _FORMATS))}")
    if digest != _digest(body):
        raise ValueError("its digest does not match, so it was changed after it was written")
    return Manifest(
        step=_count(body["step"]),
        world_size=_count(body["world_size"], at_least=1),
        files={name: _record(**record) for name, record in body["files"].items()},
        info=dict(body["info"]),
        sections=_sections(body.get("sections", {}), body["world_size"]),
    )


def _sections(ranks_of: dict[str, list[int]], world_size: int) -> dict[str, list[int]]:
    ranks = [_count(rank) for of_section in ranks_of.values() for rank in of_section]
    if ranks_of and (sorted(ranks) != [*range(len(ranks))] or not all(ranks_of.values())):
        raise ValueError(f"sections {ranks_of}: each rank belongs to one section, and each section has a rank")
    if ranks_of and world_size != len(ranks_of.get(ACTOR, ranks)):
        raise ValueError(f"sections {ranks_of}: world_size is {world_size}")
    return {section_name(name): [*of_section] for name, of_section in ranks_of.items()}


def _record(*, size: int, **hashed: str) -> FileRecord:
    ((algorithm, digest),) = hashed.items()
    if algorithm not in ALGORITHMS or not _HASH.fullmatch(digest):
        raise ValueError(f"{algorithm} {digest!r} is not a hash")
    return FileRecord(size=_count(size), digest=digest, algorithm=algorithm)


def _count(value: int, at_least: int = 0) -> int:
    if type(value) is not int or value < at_least:
        raise ValueError(f"{value!r} where a count of at least {at_least} was expected")
    return value


def _check_names(path: StoragePath, manifest: Manifest) -> None:
    claimed = step_of(path)
    if claimed is not None and claimed != manifest.step:
        raise DamagedCheckpoint(f"{path}: the directory says step {claimed}, its manifest says {manifest.step}")
    for name in manifest.files:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or str(pure) != name or not pure.name or not name.isprintable():
            raise UnsafeCheckpoint(f"{path / MANIFEST}: names {name!r}, outside of the checkpoint")


def read_verified(path: StoragePath, level: str) -> Manifest:
    """Read the manifest of a checkpoint and verify its files. Raises as `read` and `verify`."""
    manifest = read(path)
    verify(path, manifest, level)
    return manifest


def verify(path: StoragePath, manifest: Manifest, level: str) -> None:
    """Check every file of the checkpoint: ``full`` (size and hash), ``size``, or ``off``.

    Raises:
        DamagedCheckpoint: names the first file that is missing, not listed or different, and how.
        UnsafeCheckpoint: names a symbolic link, a pipe or a device, which may lead out of the checkpoint.
    """
    if level not in LEVELS:
        raise ValueError(f"verify={level!r}: one of {', '.join(LEVELS)}")
    if level == "off":
        return
    try:
        _verify_files(path, manifest, level)
    except OSError as error:
        raise DamagedCheckpoint(f"{error.filename or path}: cannot be read ({error.strerror})") from None


def _verify_files(path: StoragePath, manifest: Manifest, level: str) -> None:
    present = set(_walk(path)) - {MANIFEST}
    if missing := sorted(manifest.files.keys() - present):
        raise DamagedCheckpoint(f"{path}: {missing[0]} is missing")
    if foreign := sorted(present - manifest.files.keys()):
        raise DamagedCheckpoint(f"{path}: {foreign[0]} is not in the manifest")
    with ThreadPoolExecutor(_HASH_THREADS) as threads:  # hashlib releases the interpreter lock
        for _ in threads.map(lambda item: _verify_file(path / item[0], item[1], level), sorted(manifest.files.items())):
            pass


def verify_file(path: StoragePath, name: str, manifest: Manifest) -> None:
    """Check size and hash of one file. Raises as `verify`."""
    try:
        _verify_file(path / name, manifest.files[name], "full")
    except OSError as error:
        raise DamagedCheckpoint(f"{path / name}: cannot be read ({error.strerror})") from None


def _walk(path: StoragePath) -> Iterator[str]:
    """Every file below ``path``, as its path in the checkpoint; refuses symbolic links to files and directories."""
    if not is_local(path):
        yield from (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        return
    for directory, subdirectories, files in os.walk(path, onerror=_raise):
        for name in subdirectories + files:
            if (entry := Path(directory, name)).is_symlink():
                raise UnsafeCheckpoint(f"{entry}: is a symbolic link")
        yield from (Path(directory, name).relative_to(path).as_posix() for name in files)


def _raise(error: OSError) -> None:
    raise error


def _verify_file(file: StoragePath, record: FileRecord, level: str) -> None:
    if is_local(file) and not stat.S_ISREG(file.lstat().st_mode):
        raise UnsafeCheckpoint(f"{file}: is not a regular file")
    if (size := file.stat().st_size) != record.size:
        raise DamagedCheckpoint(f"{file}: {size} bytes, the manifest says {record.size}")
    if level == "full" and hash_of_file(file, record.algorithm) != record.digest:
        raise DamagedCheckpoint(f"{file}: its {record.algorithm} is not the one in the manifest")
