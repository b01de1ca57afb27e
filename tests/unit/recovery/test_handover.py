"""Driver and parent over their socket; and a driver that has lost Ray."""

from __future__ import annotations

import os
import signal
import socket
import threading
from contextlib import ExitStack

import pytest

from rlinf_lite import launch as launching
from rlinf_lite.cluster import own_ray
from rlinf_lite.cluster.errors import RayLost
from rlinf_lite.launch import _Driver
from rlinf_lite.recovery.handover import SOCKET_VARIABLE, Handover, ParentLink, Report
from rlinf_lite.recovery.restarts import RestartBudget, budget_for
from rlinf_lite.runner.interruption import Interruption
from rlinf_lite.stopwatch import Stopwatch


@pytest.fixture
def sockets():
    parent, driver = socket.socketpair()
    with parent, driver:
        yield parent, driver


def reported(parent: socket.socket) -> Report:
    report = Report()
    for line in parent.recv(65536).splitlines():
        report.update(line)
    return report


def test_a_driver_takes_over_what_it_is_handed(sockets, monkeypatch):
    parent, driver = sockets
    budget = RestartBudget(max_restarts=3, window_seconds=60.0)
    budget.admit(step=2, cause="x", death=True)
    given = Handover(started=12.5, budget=budget.to_json(), address="a:1", was_built=True, restart="SIGKILL\n")
    parent.sendall(given.to_line())
    descriptor = driver.detach()
    os.set_inheritable(descriptor, True)
    monkeypatch.setenv(SOCKET_VARIABLE, str(descriptor))
    link = ParentLink.connect()
    assert link.handover == given and link.is_connected
    assert SOCKET_VARIABLE not in os.environ and not os.get_inheritable(descriptor), "workers must not have it"
    link.report(is_built=True, step=3)
    link.report_step(4)
    assert reported(parent) == Report(is_built=True, step=4)
    link._connection.close()


def test_limits_are_those_of_the_config_and_what_was_spent_stays():
    spent = RestartBudget(max_restarts=3, window_seconds=60.0)
    spent.admit(step=2, cause="x", death=True)
    budget = budget_for(5, 7.0, spent.to_json())
    assert (budget.max_restarts, budget.window_seconds, budget.restarts) == (5, 7.0, spent.restarts)
    assert budget_for(5, 7.0, None) == RestartBudget(max_restarts=5, window_seconds=7.0)


def test_without_a_parent_nothing_is_reported():
    link = ParentLink()
    link.report(is_built=True)
    link.report_step(1)
    link.watch(lambda: pytest.fail("nobody to miss"))
    assert not link.is_connected and link.handover.restart == ""


def test_a_parent_that_does_not_read_does_not_hold_up_the_steps(sockets):
    link = ParentLink(sockets[1])
    for step in range(20_000):
        link.report_step(step)


def test_the_end_of_the_parent_is_noticed(sockets):
    gone = threading.Event()
    link = ParentLink(sockets[1])
    link.watch(gone.set)
    sockets[0].sendall(b"x")
    assert not gone.wait(0.1)
    sockets[0].shutdown(socket.SHUT_RDWR)
    assert gone.wait(60)
    link.report(exit_code=0)  # nobody reads it


class Ended(BaseException):
    """In place of the end of the process."""


@pytest.fixture
def driver(sockets, monkeypatch):
    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(launching, "end", end)
    monkeypatch.setattr(own_ray, "_starter", None)
    made = {"config": None, "directories": None, "request": None, "stack": ExitStack(), "given_up": threading.Event()}
    link = ParentLink(sockets[1])
    return _Driver(stop=Interruption(30.0), link=link, startup=Stopwatch(), forks=None, **made)


def test_a_driver_without_ray_asks_for_another(driver, sockets):
    own_ray.note_start()
    with pytest.raises(Ended):
        driver.ask_for_restart(RayLost("the raylet is gone"))
    assert reported(sockets[0]) == Report(ray_lost="the raylet is gone")


def test_without_a_parent_a_lost_ray_is_an_error(driver):
    own_ray.note_start()
    driver.link = ParentLink()
    with pytest.raises(RayLost, match="the raylet is gone"):
        driver.ask_for_restart(RayLost("the raylet is gone"))


def test_a_cluster_that_was_not_joined_yet_is_not_replaced_by_another(driver):
    with pytest.raises(RayLost, match="it does not answer"):
        driver.ask_for_restart(RayLost("it does not answer"))


def test_the_parent_reads_what_the_driver_said_before_it_died(sockets):
    child = os.fork()
    if child == 0:
        ParentLink(sockets[1]).report(step=9)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert reported(sockets[0]).step == 9
