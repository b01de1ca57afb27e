"""What a user gives as ``--dcp_path``: a checkpoint of rlinf_lite or of RLinf, or a DCP directory of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rlinf_lite.checkpoint import Manifest, NoCheckpoint, layout
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.identify import instead_of
from rlinf_lite.checkpoint.sections import check_sections
from rlinf_lite.checkpoint.storage import StoragePath, absolute, in_use

RLINF_DIRECTORY = "dcp_checkpoint"
CRITIC = "critic"
"""The section of a critic."""
DCP_PATH_HELP = (
    f"a global_step_N directory (its {layout.ACTOR} section), another section of it (global_step_N/{CRITIC}), RLinf's "
    f"{layout.ACTOR}/{RLINF_DIRECTORY}, or any DCP directory of a model"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Located:
    """Where the shards of a model are."""

    directory: StoragePath
    """The DCP directory."""
    manifest: Manifest | None
    """None if it is not a checkpoint of rlinf_lite."""

    @property
    def origin(self) -> str:
        """What is converted, for the manifest of what becomes of it."""
        return str(absolute(self.directory))

    @property
    def is_critic(self) -> bool:
        """Whether it is the section of a critic in a checkpoint of rlinf_lite."""
        return self.manifest is not None and self.directory.name == CRITIC

    @property
    def tied(self) -> dict[str, str]:
        """Names that a checkpoint of rlinf_lite holds under another name (alias -> name), in its ``actor/``."""
        if self.manifest is None or self.directory.name != layout.ACTOR:
            return {}
        return dict(self.manifest.info.get("tied", {}))


@contextmanager
def located(path: StoragePath, verify: str = "full") -> Iterator[Located]:
    """The DCP directory that ``path`` means, protected from deletion meanwhile. Our checkpoints are verified first.

    Raises:
        NoCheckpoint, DamagedCheckpoint, SectionMismatch: ``path`` cannot be converted, or does not verify.
    """
    if not path.is_dir():
        raise NoCheckpoint(f"--dcp_path {path}: no such directory")
    checkpoint, section = (path.parent, path.name) if _is_our_section(path) else (path, layout.ACTOR)
    if (checkpoint / layout.MANIFEST).exists() or _holds_shards(checkpoint / section):
        with in_use(checkpoint / layout.MANIFEST):
            manifest = manifests.read_verified(checkpoint, verify)
            check_sections(checkpoint, manifest, [section], whole=False)
            yield Located(directory=checkpoint / section, manifest=manifest)
        return
    for directory in (path, path / RLINF_DIRECTORY, path / layout.ACTOR / RLINF_DIRECTORY):
        if _holds_shards(directory):
            yield Located(directory=directory, manifest=None)
            return
    if hint := instead_of(path):
        raise NoCheckpoint(f"--dcp_path {path}: {hint}")
    raise NoCheckpoint(
        f"--dcp_path {path}: no checkpoint there; give a global_step_N directory, a section of it (global_step_N/"
        f"{layout.ACTOR}), or RLinf's {layout.ACTOR}/{RLINF_DIRECTORY}"
    )


def _is_our_section(path: StoragePath) -> bool:
    if not _holds_shards(path):
        return False
    lost_manifest = path.name == layout.ACTOR and path.parent.name.startswith("global_step_")
    return lost_manifest or (path.parent / layout.MANIFEST).exists()


def _holds_shards(directory: StoragePath) -> bool:
    return (directory / ".metadata").is_file()
