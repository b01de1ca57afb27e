"""A Ray of the driver's own without the processes that serve clusters: a run starts sooner, and nobody uses them.

This changes Ray from inside. A Ray that does not have exactly the parts that are changed here is started as it is.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import list2cmdline
from typing import Any

import ray

from rlinf_lite.cluster import ends_with_parent, idle_agent
from rlinf_lite.cluster.forks import setup_worker
from rlinf_lite.cluster.forks.client import ForkServer

_AGENTS = {
    "--dashboard_agent_command": ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port"),
    "--runtime_env_agent_command": ("runtime_env_agent_port",),
}
"""Of the raylet, with the names of the ports that each agent writes to a file."""
_WORKER = "--python_worker_command"
_OF_WORKERS = (
    "ray",
    "ray._private.node",
    "ray._private.ray_logging",
    "ray._private.runtime_env.setup_hook",
    "rlinf_lite.cluster.workers.critic_worker",
    "rlinf_lite.cluster.workers.host",
    "rlinf_lite.cluster.workers.policy_worker",
    "rlinf_lite.cluster.workers.reward_worker",
    "rlinf_lite.cluster.workers.rollout_worker",
)
"""What workers import besides what a fork server has: Ray reads variables of its cluster when it is imported."""
_SETUP_WORKER = Path(ray.__file__).parent / "_private" / "workers" / "setup_worker.py"


@contextmanager
def small_ray(forks: ForkServer | None = None) -> Iterator[None]:
    """Have `ray.init` start a small Ray meanwhile.

    Without autoscaler, dashboard, and the process that sends workers' logs to the driver: each is a Python that
    imports Ray, and takes a second of a core while the run starts. Its workers start without importing Ray once more,
    and its agents end with the raylet, however that ends.

    Args:
        forks: starts all workers, with their environment. So no agent is needed, and idle ones take their places,
            which a raylet's start need not wait for. None: Ray starts workers, with the environment that is asked for.
    """
    with ExitStack() as undo:
        for owner, name, change in _changes(forks):
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, change)
        yield


def _changes(forks: ForkServer | None) -> list[tuple[Any, str, Callable[..., Any]]]:
    """What to set in Ray: owner, name, value. Nothing if this Ray is not the one that is known."""
    try:
        from ray._private import node, services

        start = services.start_ray_process
        changed: dict[Any, list[str]] = {
            start: ["command", "process_type", "fate_share"],
            node.Node.start_monitor: ["self"],
            node.Node.start_log_monitor: ["self"],
            node.Node.start_api_server: ["self", "include_dashboard", "raise_on_failure"],
        }
        if any(_required(function) != names for function, names in changed.items()):
            return []
    except (ImportError, AttributeError, TypeError, ValueError):
        return []

    def start_ray_process(command: list[str], process_type: str, *args: Any, **options: Any) -> Any:
        if sys.platform == "linux":
            if forks is not None and _starts_python(command) and _knows_ports():
                command = [_forking(text, forks) for text in command]
                options["env_updates"] = {**(options.get("env_updates") or {}), **forks.environment}
                forks.starts_all_workers = True
                raylet = start(command, process_type, *args, **options)
                pid = getattr(getattr(raylet, "process", None), "pid", None)
                if pid is not None:  # otherwise each worker imports Ray
                    forks.preload(_OF_WORKERS, _of_ray({**os.environ, **options["env_updates"]}, pid))
                return raylet
            command = [_argument(text) for text in command]
        return start(command, process_type, *args, **options)

    return [
        (services, "start_ray_process", start_ray_process),
        (node.Node, "start_monitor", _nothing),
        (node.Node, "start_log_monitor", _nothing),
        (node.Node, "start_api_server", _no_page),
    ]


def _required(function: Callable[..., Any]) -> list[str]:
    """The parameters that must be given."""
    return [name for name, one in inspect.signature(function).parameters.items() if one.default is one.empty]


def _starts_python(command: list[str]) -> bool:
    """Whether this is a raylet's command, with agents and worker as they are known."""
    known = {*_AGENTS, f"{_WORKER}={list2cmdline([sys.executable, str(_SETUP_WORKER)])} "}
    return all(any(text.startswith(start) for text in command) for start in known)


def _knows_ports() -> bool:
    """Whether Ray's processes wait for the ports of each other that are known, and for no more."""
    from ray import _raylet

    names = {getattr(_raylet, name) for name in dir(_raylet) if name.endswith("_PORT_NAME")}
    return names == {"gcs_server_port", *(name for names in _AGENTS.values() for name in names)}


def _of_ray(environment: Mapping[str, str], raylet: int) -> dict[str, str]:
    """The variables that Ray reads when a worker imports it: those of the raylet, and those that it sets itself."""
    read = {name: value for name, value in environment.items() if name.startswith("RAY_")}
    job = ray.JobID.from_int(1).hex()  # a new Ray counts from 1
    return read | {"RAY_JOB_ID": job, "RAY_RAYLET_PID": str(raylet), "RAY_LD_PRELOAD_ON_WORKERS": "0"}


def _forking(text: str, forks: ForkServer) -> str:
    """An argument of a raylet, changed so that ``forks`` starts its workers, and that its agents are idle."""
    name, _, value = text.partition("=")
    if name in _AGENTS:
        idle = [sys.executable, "-I", "-S", idle_agent.__file__, ",".join(_AGENTS[name])]
        return f"{name}={list2cmdline(idle)} {value}"
    if name == _WORKER:
        return text.replace(list2cmdline([sys.executable, str(_SETUP_WORKER)]), list2cmdline(forks.command))
    return text


def _argument(text: str) -> str:
    """An argument of a raylet, with its commands for agents and workers changed; any other is returned as it is."""
    name, _, value = text.partition("=")
    if name in _AGENTS:
        return f"{name}={list2cmdline([sys.executable, '-I', '-S', ends_with_parent.__file__])} {value}"
    if name == _WORKER:
        return text.replace(list2cmdline([str(_SETUP_WORKER)]), list2cmdline([setup_worker.__file__]))
    return text


def _nothing(node: Any) -> None:
    """Neither a Ray of one node nor its driver has a use for this process."""


def _no_page(node: Any, **_: Any) -> None:
    node._webui_url = ""
