"""Tensors and objects that ranks of one machine show each other: all arrive, and no rank waits for one that is gone."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rlinf_lite.cluster.errors import is_broken_connection
from rlinf_lite.config.fields import MOST_SECONDS
from rlinf_lite.node import exchange as exchange_module
from rlinf_lite.node.descriptors import RemoteDescriptor
from rlinf_lite.node.exchange import NodeExchange, close_exchanges

_FORK = multiprocessing.get_context("fork")
_BYTES = 4096

Program = Callable[[int, Any], Any]


def in_ranks(size: int, program: Program, directory: Path, *, seconds: float = 60.0) -> list[Any]:
    """What ``program(rank, exchange)`` returns on each rank of a gloo group, or its error; None if it was killed."""
    pipes = [_FORK.Pipe(duplex=False) for _ in range(size)]

    def run(rank: int) -> None:
        for place, (_, theirs) in enumerate(pipes):
            if place != rank:
                theirs.close()  # or a killed rank would leave it open here
        torch.set_num_threads(1)
        store = dist.FileStore(str(directory / "store"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        _BEFORE.update(shared_files())
        exchange = NodeExchange.open(dist.group.WORLD, _BYTES, seconds)
        try:
            pipes[rank][1].send(program(rank, exchange))
        except Exception as error:
            pipes[rank][1].send(error)
        time.sleep(60)  # until it is killed: a process that ends would close its pipes

    ranks = [_FORK.Process(target=run, args=(rank,)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for _, theirs in pipes:
        theirs.close()
    found = []
    for ours, _ in pipes:
        try:
            assert ours.poll(30), "a rank hangs"
            found.append(ours.recv())
        except EOFError:
            found.append(None)
    for rank in ranks:
        rank.kill()
        rank.join()
    return found


_BEFORE: set[str] = set()
"""What a rank had open before its exchange."""


def shared_files() -> set[str]:
    """Pipes and memory that this process has open."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one that lists them
            found.add(os.readlink(f"/proc/self/fd/{number}"))
    return {target for target in found if target.startswith(("pipe:", "/memfd:"))} - _BEFORE


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rank_sees_what_all_have_shown(tmp_path, size):
    def program(rank: int, exchange: NodeExchange) -> int:
        chance = random.Random(rank)
        for number in range(300):
            dtype = [torch.float32, torch.int64, torch.bfloat16, torch.uint8][number % 4]
            shape = [(), (7,), (3, 5), (0,)][number // 4 % 4]
            parts = exchange.show(torch.full(shape, (10 * number + rank) % 200, dtype=dtype))
            if chance.random() < 0.1:
                time.sleep(0.002)  # the others may be in the next call by now
            for other, part in enumerate(parts):
                assert torch.equal(part, torch.full(shape, (10 * number + other) % 200, dtype=dtype)), (number, other)
        return number

    assert in_ranks(size, program, tmp_path) == [299] * size


def test_an_object_that_does_not_fit_is_none_on_all_ranks(tmp_path):
    def program(rank: int, exchange: NodeExchange) -> list[Any]:
        shown = [exchange.show_object({"rank": rank, "text": "x" * length * rank}) for length in (1, _BYTES, 2)]
        return [None if each is None else [one["rank"] for one in each] for each in shown]

    assert in_ranks(2, program, tmp_path) == [[[0, 1], None, [0, 1]]] * 2


@pytest.mark.parametrize("is_awaited", [False, True])
def test_a_rank_that_dies_is_named_and_no_rank_waits_for_it(tmp_path, is_awaited):
    def program(rank: int, exchange: NodeExchange) -> list[str]:
        exchange.show(torch.zeros(3))
        if rank == 1:
            time.sleep(0.3 * is_awaited)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.3 * (not is_awaited))
        said = []
        for _ in range(2):
            with pytest.raises(RuntimeError) as raised:
                exchange.show(torch.zeros(3))
            assert is_broken_connection(raised.value)
            said.append(str(raised.value))
        return said

    first, second, third = in_ranks(3, program, tmp_path)
    assert second is None
    for said in (first, third):
        assert said[0].startswith("connection closed by rank ") and said[1].startswith("this exchange has failed: "), (
            said
        )


def test_a_rank_that_does_not_come_is_named(tmp_path):
    def program(rank: int, exchange: NodeExchange) -> str:
        if rank == 1:
            return ""
        with pytest.raises(RuntimeError, match=r"timed out waiting for rank 1 for 0\.2 seconds") as raised:
            exchange.show(torch.zeros(3))
        assert is_broken_connection(raised.value)
        return str(raised.value)

    assert len(in_ranks(2, program, tmp_path, seconds=0.2)[0]) > 0


@pytest.mark.parametrize("refuses", ["make_memory", "open"])
def test_without_shared_memory_on_one_rank_there_is_no_exchange(tmp_path, monkeypatch, refuses):
    """As in another container: no rank has one, and nothing stays open."""
    module, name = {"open": (RemoteDescriptor, "open"), "make_memory": (exchange_module, "make_memory")}[refuses]
    original = getattr(module, name)

    def refused(*args: Any) -> int:
        if dist.get_rank() == 1:
            raise OSError("refused")
        number: int = original(*args)
        return number

    monkeypatch.setattr(module, name, refused)

    def program(rank: int, exchange: NodeExchange | None) -> tuple[bool, set[str]]:
        return exchange is None, shared_files()

    assert in_ranks(2, program, tmp_path) == [(True, set())] * 2


def test_a_dropped_exchange_leaves_nothing_open(tmp_path):
    def program(rank: int, exchange: NodeExchange) -> bool:
        before = shared_files()
        for _ in range(3):
            again = NodeExchange.open(dist.group.WORLD, _BYTES, 60.0)
            assert again is not None and len(again.show(torch.zeros(2))) == 2
            dist.barrier()
            del again
        return shared_files() == before

    assert in_ranks(2, program, tmp_path) == [True, True]


def test_a_closed_exchange_is_noticed_at_once_and_a_long_timeout_is_no_error(tmp_path):
    def program(rank: int, exchange: NodeExchange) -> str:
        exchange.show(torch.zeros(2))
        if rank == 1:
            time.sleep(0.2)
            close_exchanges()
        with pytest.raises(RuntimeError, match="connection closed") as raised:
            exchange.show(torch.zeros(2))
        assert is_broken_connection(raised.value)
        return str(raised.value)

    first, second = in_ranks(2, program, tmp_path, seconds=MOST_SECONDS)
    assert first.startswith("connection closed by rank 1, ") and second == "connection closed by this rank"


def test_a_child_of_a_rank_does_not_hold_its_end_open(tmp_path):
    def program(rank: int, exchange: NodeExchange) -> str:
        exchange.show(torch.zeros(2))
        if rank == 1:
            if os.fork() == 0:
                time.sleep(6)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="connection closed"):
            exchange.show(torch.zeros(2))
        return "at once" if time.monotonic() - began < 4 else "late"

    assert in_ranks(2, program, tmp_path)[0] == "at once"
