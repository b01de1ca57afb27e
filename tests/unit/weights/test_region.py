"""Shared memory for weights: seen by every process that opened it, whole or torn, and gone with the last of them."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from rlinf_lite.weights.pieces import WeightPiece
from rlinf_lite.weights.region import Place, Region, RegionAddress, layout_of

_FORK = multiprocessing.get_context("fork")


def weights(step: int) -> dict[str, torch.Tensor]:
    """All there is: types of 1, 2, 4 and 8 bytes, a scalar, and a size that is no multiple of the alignment."""
    generator = torch.Generator().manual_seed(step)
    return {
        "embed": torch.randn(300, 7, generator=generator),
        "half": torch.randn(33, 2, 3, generator=generator).bfloat16(),
        "norm": torch.randn(5, generator=generator),
        "scale": torch.randn((), generator=generator),
        "count": torch.randint(1 << 40, (3,), generator=generator),
        "mask": torch.randint(2, (9,), generator=generator).bool(),
    }


def rows_of(rank: int, size: int, step: int) -> Iterator[WeightPiece]:
    """What rank ``rank`` of ``size`` writes."""
    for name, tensor in weights(step).items():
        if not tensor.dim():
            yield from [WeightPiece(name, 0, tensor)][rank:]
            continue
        first, last = (part * len(tensor) // size for part in (rank, rank + 1))
        yield WeightPiece(name, first, tensor[first:last])


def engine(address: RegionAddress) -> dict[str, torch.Tensor]:
    """What an engine computes with that keeps its weights there."""
    held = {name: torch.empty_like(tensor) for name, tensor in weights(0).items()}
    Region.open(address, is_private=True).become(held.items())
    return held


def equal(held: dict[str, torch.Tensor], step: int) -> bool:
    return all(torch.equal(held[name], tensor) for name, tensor in weights(step).items())


@contextmanager
def process(target: Callable[..., Any], *args: Any) -> Iterator[Connection]:
    """A process that runs ``target(connection, *args)``; the other end of its connection. Killed on leaving."""
    ours, theirs = _FORK.Pipe()
    started = _FORK.Process(target=target, args=(theirs, *args))
    started.start()
    theirs.close()
    try:
        yield ours
    finally:
        started.kill()
        started.join()


def make(connection: Connection, size: int) -> None:
    """Rank 0: makes a region, and writes its rows of each step that it is asked for; none: kills itself in between."""
    region, address = Region.make(layout_of(weights(0).items()))
    connection.send(address)
    serve(connection, region, 0, size)


def join(connection: Connection, address: RegionAddress, rank: int, size: int) -> None:
    """Another rank."""
    serve(connection, Region.open(address, is_private=False), rank, size)


def serve(connection: Connection, region: Region, rank: int, size: int) -> None:
    while True:
        if (step := connection.recv()) is None:
            region.write(killed_in_between(rows_of(rank, size, 9)))
        region.write(rows_of(rank, size, step))
        connection.send(step)


def killed_in_between(pieces: Iterator[WeightPiece]) -> Iterator[WeightPiece]:
    yield next(pieces)
    name, first, rows = next(pieces)
    yield WeightPiece(name, first, rows[: len(rows) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


def read(connection: Connection, address: RegionAddress) -> None:
    """An engine: answers whether it has the weights of the steps that it is asked about."""
    held = engine(address)
    while True:
        connection.send(equal(held, connection.recv()))


def asked(connection: Connection, question: int) -> Any:
    connection.send(question)
    return connection.recv()


def test_two_ranks_write_what_two_engines_have_at_once():
    with process(make, 2) as first:
        address = first.recv()
        with process(join, address, 1, 2) as second, process(read, address) as other:
            held = engine(address)
            for step in (1, 2, 3):
                assert [asked(rank, step) for rank in (first, second)] == [step, step]
                assert equal(held, step) and asked(other, step)
            assert not asked(other, 2)
            held["embed"][0, 0] += 1  # nobody else sees it
            assert asked(other, 3) and not equal(held, 3)


def test_weights_are_as_aligned_as_torch_aligns_its_own():
    region, address = Region.make(layout_of(weights(0).items()))
    for tensors in (region.tensors, engine(address)):
        assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors.values())


def test_an_engine_keeps_what_is_there_when_a_rank_is_killed_and_takes_a_new_region():
    with process(make, 1) as rank:
        address = rank.recv()
        held = engine(address)
        assert asked(rank, 1) == 1 and equal(held, 1)
        rank.send(None)
        with pytest.raises(EOFError):
            rank.recv()  # killed while it wrote
    assert not equal(held, 1) and not equal(held, 9)
    assert torch.equal(held["embed"], weights(9)["embed"]) and torch.equal(held["norm"], weights(1)["norm"])
    with pytest.raises(FileNotFoundError):
        Region.open(address, is_private=True)
    with process(make, 1) as rank:
        address = rank.recv()
        Region.open(address, is_private=True).become(held.items())
        assert asked(rank, 1) == 1 and equal(held, 1)
    assert equal(held, 1), "whatever becomes of the process that made it"


def test_ranks_do_not_notice_that_an_engine_is_killed():
    with process(make, 1) as rank:
        address = rank.recv()
        with process(read, address) as killed:
            assert asked(rank, 1) == 1 and asked(killed, 1)
        assert asked(rank, 2) == 2 and equal(engine(address), 2)


def test_a_process_that_drops_its_region_holds_nothing_of_it():
    region, address = Region.make(layout_of(weights(0).items()))
    held = engine(address)
    del region
    assert holds(address) and held["embed"].shape == (300, 7)
    del held
    assert not holds(address)


def holds(address: RegionAddress) -> bool:
    with open("/proc/self/maps") as maps:
        return address.memory.target in maps.read() or any(address.memory.target in link for link in open_files())


def open_files() -> list[str]:
    links = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one that listed them
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    return links


def changed_memory(address: RegionAddress, **changed: object) -> RegionAddress:
    return dataclasses.replace(address, memory=dataclasses.replace(address.memory, **changed))


@pytest.mark.parametrize("changed", [{"target": "/memfd:of others"}, {"number": 1 << 20}, {"pid": 1 << 30}])
def test_nothing_else_is_taken_for_a_region(changed):
    region, address = Region.make(layout_of(weights(0).items()))
    with pytest.raises(OSError, match="/proc/"):
        Region.open(changed_memory(address, **changed), is_private=True)
    assert region.tensors.keys() == weights(0).keys()


def test_a_file_in_its_place_is_not_opened(tmp_path):
    """As where process ids are counted differently, in another container."""
    file = tmp_path / "file"
    file.write_text("a user's")
    descriptor = os.open(file, os.O_RDWR)
    region, address = Region.make(layout_of(weights(0).items()))
    with pytest.raises(OSError, match=" is "):
        Region.open(changed_memory(address, number=descriptor), is_private=False)
    os.close(descriptor)
    assert file.read_text() == "a user's" and region.tensors


def test_too_large_a_region_is_an_error_not_a_crash():
    with pytest.raises(OSError, match=r"1152921504606846976 bytes are needed, and \d+ are free"):
        Region.make({"huge": Place(offset=0, shape=(1 << 60,), dtype="uint8")})


def test_a_model_of_other_shapes_does_not_fit():
    region, _ = Region.make(layout_of(weights(0).items()))
    held = copy.copy(weights(0)) | {"norm": torch.zeros(6)}
    with pytest.raises(AssertionError, match="norm"):
        region.become(held.items())
