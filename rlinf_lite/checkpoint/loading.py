"""One collective load: what is verified, by which rank, and in which order."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from rlinf_lite import faults, rng
from rlinf_lite.checkpoint import layout
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.errors import DamagedCheckpoint
from rlinf_lite.checkpoint.file_state import FileState
from rlinf_lite.checkpoint.formats.dcp_reader import ReadPlan, ShardReader
from rlinf_lite.checkpoint.formats.read_ahead import warming
from rlinf_lite.checkpoint.formats.training_file import file_reader
from rlinf_lite.checkpoint.identify import other_layout
from rlinf_lite.checkpoint.manifest import FileRecord, Manifest
from rlinf_lite.checkpoint.ranks import Ranks
from rlinf_lite.checkpoint.reports import LoadReport
from rlinf_lite.checkpoint.sections import Section, check_sections, files_of, section_of_file
from rlinf_lite.checkpoint.state import State, check_keys, give_back, take
from rlinf_lite.checkpoint.storage import StoragePath, in_use

_NOTHING = Metadata({}, storage_data={})
"""What a section that the checkpoint does not have holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What one rank loads from: a checkpoint whose manifest is read, and whose sections are checked already."""

    path: StoragePath
    manifest: Manifest
    section: Section
    whole: bool
    whole_files: Mapping[str, FileRecord]
    """The files that this rank reads and verifies whole, by their name in its section."""

    @property
    def directory(self) -> StoragePath:
        """Of the section."""
        return self.path / self.section.name

    @property
    def saved_ranks(self) -> tuple[int, ...]:
        """The ranks that wrote the section; empty if the checkpoint does not have it."""
        return self.manifest.ranks_of().get(self.section.name, ())

    @property
    def has_shards(self) -> bool:
        """Whether the section consists of DCP shards."""
        return self.manifest.has_shards(self.section.name)


class PartLoader(Protocol):
    """Loads one rank's state. Its methods are called in this order on all ranks; an error on one is raised on all."""

    def prepare(self) -> ReadPlan | None:
        """Check that section and state fit, without changing anything; return what of which shard will be read."""

    def read(self) -> int:
        """Verify and read; return the number of bytes."""

    def finish(self) -> bool:
        """Give the state what was read; return whether this rank's RNG state was restored."""


class _ShardLoader:
    """Loads tensors from DCP shards."""

    def __init__(self, source: Source, state: State) -> None:
        self._source, self._state = source, state
        self._restorable = False

    def prepare(self) -> ReadPlan:
        source, rank = self._source, self._source.section.rank
        self._reader = ShardReader(source.directory, None if source.has_shards else _NOTHING)
        metadata = self._reader.metadata
        lacks_rng = bool(source.manifest.info.get(manifests.LACKS_RNG, False))
        same = source.whole and source.saved_ranks == source.section.ranks and not lacks_rng
        self._restorable = same and rng.same_devices(metadata.state_dict_metadata, rank)
        self._asked = take(self._state)
        if source.whole:
            _check_rng_entries(source.directory, metadata, source.saved_ranks)
        if self._restorable:
            self._asked[rng.key(rank)] = rng.capture()
        check_keys(source.directory, metadata, self._asked, whole=source.whole)
        self._plan = self._reader.plan(self._asked)
        return self._plan

    def read(self) -> int:
        source = self._source
        _reach("load.read", source.manifest.step, source.section.rank, source.directory)
        num_bytes = self._reader.fill(self._plan, source.whole_files)
        if self._restorable:
            _check_rng(source.path, source.section.rank, self._asked[rng.key(source.section.rank)])
        return num_bytes

    def finish(self) -> bool:
        give_back(self._state, self._asked)
        if self._restorable:
            rng.restore(self._asked[rng.key(self._source.section.rank)])
        return self._restorable


class _FilesLoader:
    """Loads a `FileState` from files of its own layout."""

    def __init__(self, source: Source, state: FileState) -> None:
        self._source, self._state = source, state

    def prepare(self) -> None:
        return None

    def read(self) -> int:
        """Verify: `FileState.load` then needs no errors of its own for damaged bytes, which only one rank might see."""
        source = self._source
        _reach("load.read", source.manifest.step, source.section.rank, source.directory)
        names = [f"{source.section.name}/{name}" for name in source.whole_files]
        for name in names:
            manifests.verify_file(source.path, name, source.manifest)
        return sum(source.manifest.files[name].size for name in names)

    def finish(self) -> bool:
        source = self._source
        names = files_of(source.section.name, source.manifest)
        return self._state.load(names.keys(), file_reader(source.directory), weights_only=not source.whole)


def load(
    ranks: Ranks, section: Section, path: StoragePath, state: State | FileState, *, seed: int, verify: str, whole: bool
) -> LoadReport:
    """See `Checkpointer.load`."""
    started = time.perf_counter()
    with in_use(path / layout.MANIFEST):
        manifest = ranks.first(lambda: _open(path, verify))
        asked = whole or isinstance(state, FileState) or bool(state)
        loaded = {name for name in ranks.gather(section.name if asked else None) if name is not None}
        check_sections(path, manifest, loaded, whole=whole)
        whole_files: dict[str, FileRecord] = {}
        if verify == "full":
            ranks.together(lambda: _verify_others(path, manifest, ranks, loaded))
            whole_files = section.reads(manifest) if section.name in loaded else {}
        source = Source(path=path, manifest=manifest, section=section, whole=whole, whole_files=whole_files)
        return fill(ranks, source, state, seed=seed, started=started)


def fill(
    ranks: Ranks,
    source: Source,
    state: State | FileState,
    *,
    seed: int,
    started: float,
    before_read: Callable[[ReadPlan | None], None] = lambda plan: None,
) -> LoadReport:
    """Fill ``state`` from a checkpoint. Collective.

    Args:
        started: `time.perf_counter` at the start of the load.
        before_read: called on all ranks with the plan of what each will read; None if a rank reads no shards.
    """
    manifest = source.manifest
    with _without_collector():
        loader = ranks.together(lambda: _loader(source, state))
        with warming([source.directory / name for name in source.whole_files]):
            plan = ranks.together(loader.prepare)
        before_read(plan)
        num_bytes = ranks.together(loader.read)
        restored = ranks.together(loader.finish)
    if source.whole and not restored:
        rng.reseed(seed, manifest.step, source.section.rank)
    read, all_restored = zip(*ranks.gather((num_bytes, restored)), strict=True)
    return LoadReport(
        path=source.path,
        manifest=manifest,
        load_seconds=time.perf_counter() - started,
        rng_restored=all(all_restored),
        num_bytes=sum(read),
    )


@contextmanager
def _without_collector() -> Iterator[None]:
    """Pause Python's garbage collector: a load makes many objects but no cycles, and each look through all objects
    of a trainer takes half a second."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _loader(source: Source, state: State | FileState) -> PartLoader:
    """
    Raises:
        SectionMismatch: the section has the layout of the other kind of state.
    """
    if isinstance(state, FileState):
        if source.has_shards:
            raise other_layout(source.directory, wants_files=True)
        return _FilesLoader(source, state)
    if source.saved_ranks and state and not source.has_shards:
        raise other_layout(source.directory, wants_files=False)
    return _ShardLoader(source, state)


def _check_rng_entries(directory: StoragePath, metadata: Metadata, ranks: Collection[int]) -> None:
    """Check that exactly the ``ranks`` that wrote the section have an RNG state, in the usual form.

    Raises:
        DamagedCheckpoint: names the wrong entry.
    """
    held: dict[str, dict[str, Any]] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if name.startswith(rng.PREFIX):
            key, _, part = name.rpartition(".")
            held.setdefault(key, {})[part] = entry
    if not held:
        return  # written by another program; if the caller asks for an RNG state, it is reported as missing
    expected = {rng.key(rank) for rank in ranks}
    if wrong := sorted(expected ^ held.keys()):
        what = "is missing" if wrong[0] in expected else "is there"
        raise DamagedCheckpoint(
            f"{directory}: {wrong[0]} {what}, but the manifest says that {len(ranks)} rank(s) wrote it"
        )
    form = {part: (tensor.dtype, tensor.shape) for part, tensor in rng.capture().items() if part != "cuda"}
    for key, parts in held.items():
        for part, (dtype, shape) in form.items():
            found = parts.get(part)
            if not isinstance(found, TensorStorageMetadata) or (found.properties.dtype, found.size) != (dtype, shape):
                raise DamagedCheckpoint(
                    f"{directory}: {key}.{part} is not an RNG state, which is {dtype} {list(shape)}"
                )


def _check_rng(path: StoragePath, rank: int, state: rng.RngState) -> None:
    try:
        rng.check(state)
    except ValueError as error:
        raise DamagedCheckpoint(f"{path}: {rng.key(rank)}: {error}") from None


def _open(path: StoragePath, verify: str) -> Manifest:
    """Read the manifest, and verify sizes and small files, on rank 0; other files are hashed by the ranks."""
    manifest = manifests.read(path)
    _reach("load.manifest", manifest.step, 0, path)
    manifests.verify(path, manifest, "size" if verify == "full" else verify)
    if verify == "full":
        for name in manifest.files:
            if section_of_file(name) is None:
                manifests.verify_file(path, name, manifest)
    return manifest


def _reach(phase: str, step: int, rank: int, path: StoragePath) -> None:
    """Let an injected fault strike; its OSError becomes what a real one does."""
    try:
        faults.reach(phase, step=step, rank=rank, path=str(path))
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: cannot be read ({error.strerror})") from None


def _verify_others(path: StoragePath, manifest: Manifest, ranks: Ranks, loaded: Collection[str]) -> None:
    """Verify the shards of sections that no rank loads; each rank takes some of them."""
    others = sorted(name for name in manifest.files if section_of_file(name) not in (None, *loaded))
    for name in others[ranks.rank :: ranks.size]:
        manifests.verify_file(path, name, manifest)
