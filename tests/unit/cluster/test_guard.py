"""Calls to Ray while it is there, and none when it is gone; with Ray itself: tests/e2e/test_ray_lost.py."""

from __future__ import annotations

import ast
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from ray import exceptions as ray_errors

from rlinf_lite.cluster import guard as module
from rlinf_lite.cluster.errors import RayLost
from rlinf_lite.cluster.guard import Guard

CLUSTER = Path(module.__file__).parent


@dataclass
class Pulse:
    """Stands where `RayPulse` does."""

    gone: str | None = None
    gone_after: float | None = None
    """Seconds from the first look on."""
    answers: list[bool] = field(default_factory=list)
    """Of the head, one for each look; then it answers."""
    reachable: bool = True
    _began: float | None = None

    def ended(self) -> str | None:
        self._began = self._began or time.monotonic()
        if self.gone_after is not None and time.monotonic() - self._began > self.gone_after:
            self.gone = "the raylet is gone"
        return self.gone

    def lost(self) -> str | None:
        self.reachable = self.answers.pop(0) if self.answers else True
        return self.ended()


class Question:
    """What is asked of Ray, and how often it was."""

    def __init__(self, answer: object = None) -> None:
        self.answer, self.times = answer, 0

    def __call__(self, *args: object, **options: object) -> object:
        self.times += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer, args, options


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(module, "_SETTLE_SECONDS", 0.3)


def watching(pulse: Pulse) -> Guard:
    guard = Guard()
    guard.watch(pulse)  # type: ignore[arg-type]
    return guard


def of_a_worker(cause: Exception) -> Exception:
    error = ray_errors.RayTaskError("run", "traceback", cause)
    return error.as_instanceof_cause()


def test_a_call_is_passed_on():
    assert watching(Pulse()).ask(Question(4), 1, two=2) == (4, (1,), {"two": 2})


def test_a_ray_that_is_gone_is_not_asked():
    guard, question = watching(Pulse(gone="the raylet is gone")), Question()
    asks: list[Callable[[], object]] = [
        lambda: guard.ask(question),
        lambda: guard.ask_head(question),
        lambda: guard.get("a reference"),
        lambda: guard.wait(["a reference"], timeout=60),
        guard.check,
        guard.check_head,
    ]
    for ask in [*asks, *asks]:  # the handler of an error may ask again
        with pytest.raises(RayLost, match="the raylet is gone"):
            ask()
    guard.kill("a handle")  # does not raise: workers end with their raylet
    assert question.times == 0 and guard.lost


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), ray_errors.RaySystemError("no"), ray_errors.RpcError("no", 14)]
)
def test_an_error_that_comes_before_the_death_is_known_is_rays_loss(error):
    with pytest.raises(RayLost, match="the raylet is gone"):
        watching(Pulse(gone_after=0.1)).ask(Question(error))


def test_a_broken_connection_to_a_living_ray_is_its_loss():
    guard = watching(Pulse())
    with pytest.raises(RayLost, match=r"its connection broke: .*Broken pipe"):
        guard.ask(Question(BrokenPipeError(32, "Broken pipe")))
    assert guard.lost


@pytest.mark.parametrize(
    "error",
    [
        of_a_worker(BrokenPipeError(32, "Broken pipe")),
        ray_errors.RayActorError(),
        ray_errors.RaySystemError("no"),
        ray_errors.GetTimeoutError("no"),
        KeyError(1),
    ],
)
def test_an_error_of_a_worker_is_not(error):
    guard = watching(Pulse())
    with pytest.raises(type(error)):
        guard.ask(Question(error))
    assert not guard.lost


def test_what_a_signal_handler_raises_is_not_lost_in_rays_c_code():
    """Python makes a SystemError of it where C code has a result already."""

    class Stop(BaseException):
        pass

    def question() -> None:
        raise SystemError("wait returned a result with an exception set") from Stop()

    with pytest.raises(Stop):
        Guard(Pulse()).ask(question)
    with pytest.raises(SystemError, match="bad argument"):
        Guard(Pulse()).ask(exec, "raise SystemError('bad argument')")


def test_a_worker_that_died_with_its_raylet_is_no_loss_of_a_worker():
    with pytest.raises(RayLost):
        watching(Pulse(gone_after=0.0)).ask(Question(ray_errors.RayActorError()))


def test_the_head_is_asked_when_it_answers(monkeypatch):
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    pulse, question = Pulse(answers=[False, False, True]), Question()
    watching(pulse).ask_head(question)
    assert question.times == 1 and not pulse.answers


def test_a_stop_is_heard_while_the_head_is_waited_for():
    guard, question, asked = Guard(), Question(), KeyError("asked to stop")

    def check() -> None:
        raise asked

    guard.watch(Pulse(answers=[False] * 100), check)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="asked to stop"):
        guard.ask_head(question)
    assert question.times == 0


@pytest.mark.parametrize(
    ("pulse", "there"),
    [(Pulse(), True), (Pulse(answers=[False] * 100), False), (Pulse(gone="the raylet is gone"), False)],
)
def test_whether_the_head_is_there_is_told_at_once(pulse, there):
    assert watching(pulse).head_is_there == there and Guard().head_is_there


def test_after_abandon_nothing_is_asked():
    guard, question = watching(Pulse()), Question()
    guard.abandon("SIGTERM")
    with pytest.raises(RayLost, match="SIGTERM"):
        guard.ask(question)
    assert question.times == 0


REMOTE = {"host.py", "rendezvous.py", "policy_worker.py", "rollout_worker.py", "reward_worker.py"}
"""Modules of the worker processes."""
BEFORE_AND_AFTER = {
    ("joining.py", "init"),
    ("session.py", "shutdown"),
    ("pulse.py", "nodes"),  # RayPulse itself
}
OF_THIS_PROCESS = {"remote", "get_runtime_context"}


def test_the_driver_calls_ray_through_the_guard_only():
    found = set()
    for file in (file for file in CLUSTER.rglob("*.py") if file.name not in {"guard.py", *REMOTE}):
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            if not isinstance(call.func, ast.Attribute):
                continue
            of_ray = isinstance(call.func.value, ast.Name) and call.func.value.id == "ray"
            if (of_ray and call.func.attr not in OF_THIS_PROCESS) or (call.func.attr == "remote" and not of_ray):
                found.add((file.name, call.func.attr))
    assert found <= BEFORE_AND_AFTER, found - BEFORE_AND_AFTER
