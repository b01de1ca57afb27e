"""Sections: the directories ``actor/``, ``critic/`` of a checkpoint, each the sharded state of one trainer.

Every rank has one section, which it writes and reads. All ranks take part in every save and load.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from rlinf_lite.checkpoint import layout
from rlinf_lite.checkpoint.errors import SectionMismatch
from rlinf_lite.checkpoint.manifest import FileRecord, Manifest
from rlinf_lite.checkpoint.ranks import Ranks

_FILE = re.compile(rf"({layout.SECTION_NAME})/(.+)")
_SHARD = re.compile(r"__([0-9]+)_[0-9]+\.distcp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One rank's section, and those of the other ranks."""

    name: str
    """Such as ``actor``; the name of the directory."""
    rank: int
    """Of this process, among all ranks."""
    ranks_of: Mapping[str, tuple[int, ...]]
    """The ranks of every section, in order: ``{"actor": (0, 1), "critic": (2,)}``."""

    @classmethod
    def agree(cls, ranks: Ranks, name: str) -> Section:
        """Give this rank's section, and learn those of the others. Collective.

        Raises:
            ValueError: a rank gave a name that no section can have.
        """
        names = ranks.collect(lambda: layout.section_name(name))
        ranks_of = {one: tuple(rank for rank, other in enumerate(names) if other == one) for one in sorted(set(names))}
        return cls(name=name, rank=ranks.rank, ranks_of=ranks_of)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of this section."""
        return self.ranks_of[self.name]

    @property
    def place(self) -> int:
        """This rank's index in `ranks`."""
        return self.ranks.index(self.rank)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the section's ``.metadata``."""
        return self.place == 0

    @property
    def shard(self) -> str:
        """The name of this rank's shard file."""
        return f"__{self.place}_0.distcp"

    @property
    def metadata(self) -> str:
        """The path of the section's ``.metadata`` in the checkpoint."""
        return f"{self.name}/{layout.METADATA}"

    def manifest(self, step: int, files: dict[str, FileRecord], info: dict[str, Any]) -> Manifest:
        """The manifest of a checkpoint that these ranks write."""
        num_ranks = sum(map(len, self.ranks_of.values()))
        return Manifest(
            step=step,
            world_size=len(self.ranks_of.get(layout.ACTOR, ())) or num_ranks,
            files=files,
            info=info,
            sections={} if [*self.ranks_of] == [layout.ACTOR] else {name: [*r] for name, r in self.ranks_of.items()},
        )

    def reads(self, manifest: Manifest) -> dict[str, FileRecord]:
        """The files of its section that this rank reads whole, by their name in the section.

        Shards go by their number: if as many ranks wrote the section, each reads its own.
        """
        held = files_of(self.name, manifest)
        numbers = {name: int(match[1]) for name in held if (match := _SHARD.fullmatch(name))}
        others = sorted(held.keys() - numbers.keys(), key=lambda name: (-held[name].size, name))
        mine = [name for name, number in numbers.items() if number % len(self.ranks) == self.place]
        return {name: held[name] for name in (*mine, *others[self.place :: len(self.ranks)])}


def files_of(section: str, manifest: Manifest) -> dict[str, FileRecord]:
    """The files of a section but for ``.metadata``, by their name in it."""
    return {
        name.removeprefix(f"{section}/"): record
        for name, record in manifest.files.items()
        if section_of_file(name) == section
    }


def section_of_file(name: str) -> str | None:
    """The section of a shard or other large file, by its path in the checkpoint.

    None for ``.metadata``, ``data.pt`` and the manifest, which are small, and which one rank verifies for all.
    """
    match = _FILE.fullmatch(name)
    return match[1] if match and match[2] != layout.METADATA and name != layout.DATA else None


def check_sections(path: object, manifest: Manifest, wanted: Collection[str], *, whole: bool) -> None:
    """Check that a checkpoint has the sections that are to be loaded, and with ``whole`` no others.

    Raises:
        SectionMismatch: names path, section and remedy.
    """
    held = manifest.ranks_of()
    listed = ", ".join(f"{name}/" for name in held)
    weights_alone = "start a new run from the model weights alone (runner.resume_mode=weights)"
    if missing := sorted(set(wanted) - held.keys()):
        otherwise = f", or {weights_alone}" if whole else ""
        raise SectionMismatch(
            f"{path}: has no section {missing[0]}/, only {listed}; give a checkpoint that has it{otherwise}"
        )
    if whole and (extra := sorted(held.keys() - set(wanted))):
        raise SectionMismatch(
            f"{path}: has a section {extra[0]}/, which none of these ranks loads; resume with the config of the run "
            f"that wrote it, or {weights_alone}"
        )
