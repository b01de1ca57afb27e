"""What a user gives as ``--megatron_path``: a checkpoint in Megatron's layout of rlinf_lite, RLinf or Megatron-LM."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rlinf_lite.checkpoint import Manifest, NoCheckpoint, layout
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.formats.training_file import file_reader
from rlinf_lite.checkpoint.identify import MEGATRON_TRACKER, instead_of
from rlinf_lite.checkpoint.storage import StoragePath, absolute, in_use, read_file
from rlinf_lite.errors import ConfigError
from rlinf_lite.weights.megatron.architecture import Architecture
from rlinf_lite.weights.megatron.files import MegatronFiles

MEGATRON_PATH_HELP = (
    f"a global_step_N directory, its {layout.ACTOR} directory, an iter_N in it, or whatever Megatron-LM was given as "
    f"--save; where there are several, the one that {MEGATRON_TRACKER} names"
)
RELEASE = "release"
"""Megatron's name for weights without a training state."""
_ITERATION = re.compile(r"iter_([0-9]{7,})")


@dataclass(frozen=True, kw_only=True, slots=True)
class LocatedMegatron:
    """Where the files are."""

    directory: StoragePath
    """The one that holds `iteration`."""
    iteration: str
    """Such as ``iter_0000050``, or ``release``."""
    names: list[str]
    """Of the iteration's files, by path in `directory`."""
    manifest: Manifest | None
    """None if it is not a checkpoint of rlinf_lite."""

    is_critic = False

    @property
    def origin(self) -> str:
        """What is converted, for the manifest of what becomes of it."""
        return str(absolute(self.directory / self.iteration))

    @property
    def step(self) -> int:
        """Completed steps, by the name of the iteration; 0 for weights alone."""
        match = _ITERATION.fullmatch(self.iteration)
        return int(match[1]) if match else 0

    def files(self, arch: Architecture) -> MegatronFiles:
        """Raises as `MegatronFiles`."""
        return MegatronFiles(self.names, file_reader(self.directory), arch)


@contextmanager
def located_megatron(path: StoragePath, verify: str = "full") -> Iterator[LocatedMegatron]:
    """The files that ``path`` means, protected from deletion meanwhile. Our checkpoints are verified first.

    Raises:
        NoCheckpoint, DamagedCheckpoint: ``path`` cannot be converted, or does not verify.
    """
    if not path.is_dir():
        raise NoCheckpoint(f"--megatron_path {path}: no such directory")
    directory, wanted = _section_of(path)
    checkpoint = directory.parent
    if not (checkpoint / layout.MANIFEST).is_file():
        yield _located(path, directory, wanted, None)
        return
    with in_use(checkpoint / layout.MANIFEST):
        manifest = manifests.read_verified(checkpoint, verify)
        yield _located(path, directory, wanted, manifest)


def _section_of(path: StoragePath) -> tuple[StoragePath, str | None]:
    """The directory that holds iterations, and the one that is wanted; None if ``path`` does not say."""
    if _is_iteration(path):
        return path.parent, path.name
    inside = path / layout.ACTOR
    return (inside if _iterations(inside) or (path / layout.MANIFEST).is_file() else path), None


def _is_iteration(path: StoragePath) -> bool:
    return path.name == RELEASE or _ITERATION.fullmatch(path.name) is not None


def _iterations(directory: StoragePath) -> list[str]:
    return sorted(one.name for one in directory.iterdir() if _is_iteration(one)) if directory.is_dir() else []


def _located(
    path: StoragePath, directory: StoragePath, wanted: str | None, manifest: Manifest | None
) -> LocatedMegatron:
    found = _iterations(directory)
    if not found:
        if (directory / layout.METADATA).is_file():
            raise NoCheckpoint(f"--megatron_path {path}: holds DCP shards; use the converters that take --dcp_path")
        hint = instead_of(path)
        raise NoCheckpoint(f"--megatron_path {path}: {hint or 'no checkpoint there; give ' + MEGATRON_PATH_HELP}")
    iteration = wanted or _tracked(directory) or found[-1]
    if iteration not in found:
        raise NoCheckpoint(f"--megatron_path {path}: holds {', '.join(found)}, but not {iteration}")
    files = (file for file in (directory / iteration).rglob("*") if file.is_file())
    names = sorted(file.relative_to(directory).as_posix() for file in files)
    return LocatedMegatron(directory=directory, iteration=iteration, names=names, manifest=manifest)


def _tracked(directory: StoragePath) -> str | None:
    """The iteration that the tracker file names; None if there is none."""
    tracker = directory / MEGATRON_TRACKER
    if not tracker.is_file():
        return None
    text = read_file(tracker).decode(errors="replace").strip()
    if text == RELEASE:
        return RELEASE
    if not text.isascii() or not text.isdecimal():
        raise NoCheckpoint(f"{tracker}: says {text!r:.40}, neither a number nor {RELEASE}")
    return f"iter_{int(text):07d}"


def check_tensor_parallel(arch: Architecture, size: int) -> None:
    """
    Raises:
        ConfigError: the model cannot be divided over so many ranks.
    """
    try:
        arch.check_tensor_parallel(size)
    except ConfigError as error:
        raise ConfigError(f"--tensor_parallel {size}: {error}") from None
