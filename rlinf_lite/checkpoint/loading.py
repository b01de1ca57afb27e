"""One collective load: what is verified, by which rank, and in which order."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from rlinf_lite.checkpoint.state import State, check_keys, give_back, take
from rlinf_lite.checkpoint.storage import StoragePath, in_use

_SHARD = re.compile(rf"{layout.ACTOR}/__([0-9]+)_[0-9]+\.distcp")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """Describes a checkpoint that was loaded."""

    path: StoragePath
    manifest: Manifest
    load_seconds: float
    rng_restored: bool
    """False if only a part was loaded; or if the checkpoint has another number of ranks, or only one of the two has a
    GPU: then each rank's RNG state was derived anew from (seed, step, rank)."""
    num_bytes: int
    """Bytes read by all ranks together."""


def load(ranks: Ranks, path: StoragePath, state: State, *, seed: int, verify: str, whole: bool) -> LoadReport:
    """See `Checkpointer.load`."""
    started = time.perf_counter()
    with in_use(path / layout.MANIFEST):
        manifest = ranks.first(lambda: _open(path, verify))
        hashes = _my_hashes(manifest, ranks) if verify == "full" else {}
        return fill(ranks, path, manifest, state, seed=seed, whole=whole, hashes=hashes, started=started)


def fill(
    ranks: Ranks,
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
    """Fill ``state`` from a checkpoint whose manifest is read already. Collective.

    Args:
        hashes: sha256 of the shards that this rank reads whole.
        started: `time.perf_counter` at the start of the load.
        before_read: called on all ranks with the plan of what each will read.
    """
    with warming([path / layout.ACTOR / name for name in hashes]):
        reader = ranks.together(lambda: ShardReader(path / layout.ACTOR))
        rank, held = ranks.rank, reader.metadata.state_dict_metadata
        restorable = whole and manifest.world_size == ranks.size and rng.same_devices(held, rank)
        wanted = ranks.together(lambda: take(state))
        if whole:
            ranks.together(lambda: _check_rng_entries(path, reader.metadata, manifest.world_size))
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
    return LoadReport(
        path=path,
        manifest=manifest,
        load_seconds=time.perf_counter() - started,
        rng_restored=restorable,
        num_bytes=sum(ranks.gather(num_bytes)),
    )


def _check_rng_entries(path: StoragePath, metadata: Metadata, world_size: int) -> None:
    """Check that exactly the ranks that wrote the checkpoint have an RNG state, in the usual form.

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
    expected = {rng.key(rank) for rank in range(world_size)}
    if wrong := sorted(expected ^ held.keys()):
        what = "is missing" if wrong[0] in expected else "is there"
        raise DamagedCheckpoint(f"{path}: {wrong[0]} {what}, but the manifest says that {world_size} rank(s) wrote it")
    form = {part: (tensor.dtype, tensor.shape) for part, tensor in rng.capture().items() if part != "cuda"}
    for key, parts in held.items():
        for part, (dtype, shape) in form.items():
            found = parts.get(part)
            if not isinstance(found, TensorStorageMetadata) or (found.properties.dtype, found.size) != (dtype, shape):
                raise DamagedCheckpoint(f"{path}: {key}.{part} is not an RNG state, which is {dtype} {list(shape)}")


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
            if reader_of(name, 1) is None:
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


def _my_hashes(manifest: Manifest, ranks: Ranks) -> dict[str, str]:
    """The sha256 of the shards that this rank reads whole: its own, if the number of ranks has not changed."""
    return {
        name.removeprefix(f"{layout.ACTOR}/"): record.sha256
        for name, record in manifest.files.items()
        if reader_of(name, ranks.size) == ranks.rank
    }


def reader_of(name: str, num_ranks: int) -> int | None:
    """The rank that hashes a file of the manifest; None if it is not a shard, which rank 0 hashes in `_open`."""
    match = _SHARD.fullmatch(name)
    return int(match.group(1)) % num_ranks if match else None
