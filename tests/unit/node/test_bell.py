"""A listener hears how far its senders are, whenever they tell it, and does not wait for one that is gone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rlinf_lite.node.bell import Bell, BellAddress, Listener

_FORK = multiprocessing.get_context("fork")


@contextmanager
def sender(address: BellAddress, act: Callable[[Bell], Any]) -> Iterator[None]:
    """A process that opens its bell, then does ``act``, then lives on."""
    ours, theirs = _FORK.Pipe()

    def run() -> None:
        os.closerange(3, theirs.fileno())  # a real sender is no child of the listener, and has nothing of it
        os.closerange(theirs.fileno() + 1, 256)
        bell = Bell([address])
        theirs.send("open")
        theirs.recv()
        act(bell)
        time.sleep(60)

    process = _FORK.Process(target=run)
    process.start()
    assert ours.recv() == "open"
    threading.Timer(0.2, ours.send, ["go"]).start()  # the listener waits by then
    try:
        yield
    finally:
        process.kill()
        process.join()


def test_it_returns_when_all_are_there():
    listener = Listener(2)
    told = []

    def ring(bell: Bell) -> None:
        time.sleep(0.2)
        bell.ring(5)

    bell = Bell([listener.addresses[1]])
    with sender(listener.addresses[0], ring):
        bell.ring(5)
        began = time.monotonic()
        listener.wait(5)
        told.append(time.monotonic() - began)
    assert told[0] > 0.3


def test_numbers_that_nobody_waited_for_do_not_matter():
    listener = Listener(1)
    bell = Bell([listener.addresses[0]])
    for number in range(70_000):  # more than a pipe takes
        bell.ring(number)
    listener.wait(69_999)
    listener.wait(3)
    threading.Timer(0.1, bell.ring, [70_001]).start()
    listener.wait(70_000)


@pytest.mark.parametrize(
    "end", [lambda bell: os.kill(os.getpid(), signal.SIGKILL), lambda bell: bell.close()], ids=["killed", "closed"]
)
def test_a_sender_that_gets_no_further(end):
    listener = Listener(1)

    def act(bell: Bell) -> None:
        bell.ring(2)
        end(bell)

    with sender(listener.addresses[0], act):
        listener.wait(2)
        listener.wait(1)
        with pytest.raises(BrokenPipeError, match="sender 0 has ended at 2, before 3"):
            listener.wait(3)


def test_a_listener_that_is_gone_does_not_matter():
    first, second = Listener(1), Listener(1)
    bell = Bell([first.addresses[0], second.addresses[0]])
    first._lent.close()
    del first
    for _ in range(3):
        bell.ring(1)
    second.wait(1)


def test_another_process_is_not_taken_for_a_sender():
    listener = Listener(1)
    address = listener.addresses[0]
    listener.wait(0)  # closes what it lent
    with pytest.raises(OSError, match="/proc/"):
        Bell([address])
