"""The newest checkpoint that verifies: an iterator over a directory, newest first, that steps over damaged ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rlinf_lite.checkpoint import layout
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.errors import CheckpointError, DamagedCheckpoint
from rlinf_lite.checkpoint.manifest import Manifest
from rlinf_lite.checkpoint.storage import StoragePath, in_use


class Candidates:
    """Iterates over the checkpoints in ``root`` that verify, newest first, as ``(path, manifest)``.

    Each is verified when its turn comes, and protected from deletion until the next one is asked for. Damaged ones are
    skipped and recorded. Example::

        candidates = Candidates(root, "full")
        for path, manifest in candidates:
            break  # the newest that verifies
        for reason in candidates.damaged.values():
            print(f"stepped over a damaged checkpoint: {reason}")
    """

    def __init__(self, root: StoragePath, level: str, *, known: Mapping[StoragePath, str] | None = None) -> None:
        """
        Args:
            level: how to verify, as for `manifest.verify`.
            known: checkpoints that are not considered, such as those already found damaged, with the reason.
        """
        self.root, self.level = root, level
        self.paths = layout.committed(root)
        """All checkpoints in ``root``, verified or not, newest first."""
        self.damaged: dict[StoragePath, str] = {}
        """The checkpoints that were stepped over so far, with the reason, newest first."""
        self._known = known or {}

    def __iter__(self) -> Iterator[tuple[StoragePath, Manifest]]:
        for path in self.paths:
            if path in self._known:
                continue
            with in_use(path / layout.MANIFEST):
                try:
                    manifest = manifests.read_verified(path, self.level)
                except CheckpointError as error:
                    self.reject(path, error)
                else:
                    yield path, manifest

    def reject(self, path: StoragePath, error: CheckpointError) -> None:
        """Record that a checkpoint that did verify is damaged after all."""
        self.damaged[path] = str(error)

    def none_verifies(self) -> DamagedCheckpoint:
        """The error for a directory in which every checkpoint was stepped over; lists the reasons."""
        known = " (others were reported before, or are not considered)" if self._known else ""
        reasons = "".join(f"\n  {reason}" for reason in self.damaged.values())
        return DamagedCheckpoint(
            f"none of the {len(self.paths)} checkpoints in {self.root} verifies{known}{':' if reasons else ''}{reasons}"
        )
