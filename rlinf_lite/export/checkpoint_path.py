"""What a user gives as ``--dcp_path``: a checkpoint of rlinf_lite or of RLinf, or a DCP directory of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rlinf_lite.checkpoint import Manifest, NoCheckpoint, layout
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.identify import instead_of
from rlinf_lite.checkpoint.storage import StoragePath, in_use

RLINF_DIRECTORY = "dcp_checkpoint"
DCP_PATH_HELP = (
    f"a global_step_N directory, its actor directory, RLinf's actor/{RLINF_DIRECTORY}, or any DCP directory of a model"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Located:
    """Where the shards of a model are."""

    directory: StoragePath
    """The DCP directory."""
    manifest: Manifest | None
    """None if it is not a checkpoint of rlinf_lite."""

    @property
    def tied(self) -> dict[str, str]:
        """Names that a checkpoint of rlinf_lite holds under another name (alias -> name)."""
        return dict(self.manifest.info.get("tied", {})) if self.manifest else {}


@contextmanager
def located(path: StoragePath, verify: str = "full") -> Iterator[Located]:
    """The DCP directory that ``path`` means, protected from deletion meanwhile. Our checkpoints are verified first.

    Raises:
        NoCheckpoint, DamagedCheckpoint: ``path`` cannot be converted, or does not verify.
    """
    if not path.is_dir():
        raise NoCheckpoint(f"--dcp_path {path}: no such directory")
    checkpoint = path.parent if _is_our_actor_directory(path) else path
    if (checkpoint / layout.MANIFEST).exists() or _holds_shards(checkpoint / layout.ACTOR):
        with in_use(checkpoint / layout.MANIFEST):
            manifest = manifests.read_verified(checkpoint, verify)
            yield Located(directory=checkpoint / layout.ACTOR, manifest=manifest)
        return
    for directory in (path, path / RLINF_DIRECTORY, path / layout.ACTOR / RLINF_DIRECTORY):
        if _holds_shards(directory):
            yield Located(directory=directory, manifest=None)
            return
    if hint := instead_of(path):
        raise NoCheckpoint(f"--dcp_path {path}: {hint}")
    raise NoCheckpoint(
        f"--dcp_path {path}: no checkpoint there; give a global_step_N directory, its {layout.ACTOR} directory, "
        f"or RLinf's {layout.ACTOR}/{RLINF_DIRECTORY}"
    )


def _is_our_actor_directory(path: StoragePath) -> bool:
    in_checkpoint = path.parent.name.startswith("global_step_") or (path.parent / layout.MANIFEST).exists()
    return path.name == layout.ACTOR and _holds_shards(path) and in_checkpoint


def _holds_shards(directory: StoragePath) -> bool:
    return (directory / ".metadata").is_file()
