"""One collective load: what is verified, by which rank, and in which order."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from rlinf_lite import faults
from rlinf_lite.checkpoint import layout, rng
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.errors import DamagedCheckpoint
from rlinf_lite.checkpoint.formats.dcp_reader import ReadPlan, ShardReader
from rlinf_lite.checkpoint.formats.read_ahead import warming
from rlinf_lite.checkpoint.manifest import Manifest
from rlinf_lite.checkpoint.ranks import Ranks
from rlinf_lite.checkpoint.reports import LoadReport
from rlinf_lite.checkpoint.sections import Section, check_sections, section_of_shard
from rlinf_lite.checkpoint.state import State, check_keys, give_back, take
from rlinf_lite.checkpoint.storage import StoragePath, in_use

_NOTHING = Metadata({}, storage_data={})
"""What a section that the checkpoint does not have holds."""


def load(
    ranks: Ranks, section: Section, path: StoragePath, state: State, *, seed: int, verify: str, whole: bool
) -> LoadReport:
    """See `Checkpointer.load`."""
    started = time.perf_counter()
    with in_use(path / layout.MANIFEST):
        manifest = ranks.first(lambda: _open(path, verify))
        loaded = {name for name in ranks.gather(section.name if whole or state else None) if name is not None}
        check_sections(path, manifest, loaded, whole=whole)
        hashes = {}
        if verify == "full":
            ranks.together(lambda: _verify_others(path, manifest, ranks, loaded))
            hashes = section.hashes(manifest) if section.name in loaded else {}
        return fill(ranks, section, path, manifest, state, seed=seed, whole=whole, hashes=hashes, started=started)


def fill(
    ranks: Ranks,
    section: Section,
    path: StoragePath,
    manifest: Manifest,
    state: State,
    *,
    seed: int,
    whole: bool,
    hashes: Mapping[str, str],
    started: float,
    before_read: Callable[[ReadPlan], None] = lambda plan: None,
) -> LoadReport:
    """Fill ``state`` from a checkpoint whose manifest is read, and whose sections are checked already. Collective.

    Args:
        hashes: sha256 of the shards that this rank reads whole, by their name in its section.
        started: `time.perf_counter` at the start of the load.
        before_read: called on all ranks with the plan of what each will read.
    """
    directory, rank, saved_ranks = path / section.name, section.rank, manifest.ranks_of().get(section.name, ())
    with warming([directory / name for name in hashes]):
        reader = ranks.together(lambda: ShardReader(directory, None if saved_ranks else _NOTHING))
        held = reader.metadata.state_dict_metadata
        restorable = whole and saved_ranks == section.ranks and rng.same_devices(held, rank)
        wanted = ranks.together(lambda: take(state))
        if whole:
            ranks.together(lambda: _check_rng_entries(directory, reader.metadata, saved_ranks))
        asked = {**wanted, rng.key(rank): rng.capture()} if restorable else wanted
        plan = ranks.together(lambda: _plan(reader, asked, whole))
    before_read(plan)
    num_bytes = ranks.together(lambda: _read(reader, plan, hashes, manifest.step, rank))
    if restorable:
        ranks.together(lambda: _check_rng(path, rank, asked[rng.key(rank)]))
    ranks.together(lambda: give_back(state, asked))
    if restorable:
        rng.restore(asked[rng.key(rank)])
    elif whole:
        rng.reseed(seed, manifest.step, rank)
    read, restored = zip(*ranks.gather((num_bytes, restorable)), strict=True)
    return LoadReport(
        path=path,
        manifest=manifest,
        load_seconds=time.perf_counter() - started,
        rng_restored=all(restored),
        num_bytes=sum(read),
    )


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
    """Read the manifest, and verify sizes and small files, on rank 0; shards are hashed while they are read."""
    manifest = manifests.read(path)
    _reach("load.manifest", manifest.step, 0, path)
    manifests.verify(path, manifest, "size" if verify == "full" else verify)
    if verify == "full":
        for name in manifest.files:
            if section_of_shard(name) is None:
                manifests.verify_file(path, name, manifest)
    return manifest


def _plan(reader: ShardReader, asked: dict[str, Any], whole: bool) -> ReadPlan:
    check_keys(reader.path, reader.metadata, asked, whole=whole)
    return reader.plan(asked)


def _read(reader: ShardReader, plan: ReadPlan, hashes: Mapping[str, str], step: int, rank: int) -> int:
    _reach("load.read", step, rank, reader.path)
    return reader.fill(plan, hashes)


def _reach(phase: str, step: int, rank: int, path: StoragePath) -> None:
    """Let an injected fault strike; its OSError becomes what a real one does."""
    try:
        faults.reach(phase, step=step, rank=rank, path=str(path))
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: cannot be read ({error.strerror})") from None


def _verify_others(path: StoragePath, manifest: Manifest, ranks: Ranks, loaded: Collection[str]) -> None:
    """Verify the shards of sections that no rank loads; each rank takes some of them."""
    others = sorted(name for name in manifest.files if section_of_shard(name) not in (None, *loaded))
    for name in others[ranks.rank :: ranks.size]:
        manifests.verify_file(path, name, manifest)
