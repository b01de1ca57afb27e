"""How a session ends: whatever Ray is like then, the first error and the exit code stay. Ray's answers are made up."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
import ray
from ray import exceptions as ray_errors

from rlinf_lite.cluster import session as module
from rlinf_lite.cluster.guard import guard
from rlinf_lite.cluster.session import Session, open_session
from rlinf_lite.cluster.watch import Watch
from rlinf_lite.config import ClusterConfig, ConfigError


@dataclass
class Pulse:
    """Stands where `RayPulse` does, of a joined cluster."""

    gone: str | None = None
    reachable: bool = True

    def ended(self) -> str | None:
        return self.gone

    def lost(self) -> str | None:
        return self.gone


@pytest.fixture
def joined(monkeypatch):
    """A joined cluster of two slots, and what is asked of it at the end."""
    pulse, asked = Pulse(), []
    guard.watch(None)
    monkeypatch.setattr(module, "connect", lambda config, rejoin, forks: "10.0.0.1:6379")
    monkeypatch.setattr(module, "_look_at_ray", lambda *watch: guard.watch(pulse))  # type: ignore[arg-type]
    monkeypatch.setattr(module, "remove_placement_group", asked.append)
    monkeypatch.setattr(Session, "reserve", lambda session: setattr(session, "_group", "group"))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray, "shutdown", lambda: asked.append("shutdown"))
    yield pulse, asked
    guard.watch(None)


def config() -> ClusterConfig:
    return ClusterConfig(component_placement={"actor,rollout,reward": "0-1"})


def test_slots_are_given_back_and_ray_is_left(joined):
    _, asked = joined
    with open_session(config(), Watch(0)):
        pass
    assert asked == ["group", "shutdown"]


@pytest.mark.parametrize("change", [{"reachable": False}, {"gone": "the raylet of this node is gone"}])
@pytest.mark.parametrize("error", [None, ConfigError("no such model")])
def test_a_ray_that_is_gone_at_the_end_changes_nothing(joined, change, error):
    """The head was preempted just then: nobody waits for it, and it is no reason to restart, or for another code."""
    pulse, asked = joined
    began, raised = time.monotonic(), None
    try:
        with open_session(config(), Watch(0)):
            vars(pulse).update(change)
            if error is not None:
                raise error
    except ConfigError as caught:
        raised = caught
    assert (raised, asked, guard.lost) == (error, [], True) and time.monotonic() - began < 5


def test_an_error_of_rays_in_giving_back_changes_nothing(joined, monkeypatch):
    pulse, asked = joined

    def broken(group: object) -> None:
        pulse.gone = "the raylet of this node is gone"
        raise ray_errors.RpcError("no", 14)

    monkeypatch.setattr(module, "remove_placement_group", broken)
    with pytest.raises(ConfigError), open_session(config(), Watch(0)):
        raise ConfigError("no such model")
    assert asked == [] and guard.lost


def test_a_stop_is_heard_while_the_head_is_waited_for(monkeypatch):
    watch, pulse = Watch(0), Pulse(reachable=False)
    monkeypatch.setattr(module, "RayPulse", lambda: pulse)

    def stop() -> None:
        raise KeyboardInterrupt

    watch.often.append(stop)
    module._look_at_ray(watch)
    try:
        with pytest.raises(KeyboardInterrupt):
            guard.ask_head(pytest.fail, "asked")
    finally:
        guard.watch(None)
