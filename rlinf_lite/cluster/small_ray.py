"""A Ray of the driver's own without the processes that serve clusters: a run starts sooner, and nobody uses them.

This changes Ray from inside. A Ray that does not have exactly the parts that are changed here is started as it is.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import list2cmdline
from typing import Any

import ray

from rlinf_lite.cluster import ends_with_parent
from rlinf_lite.cluster.forks import setup_worker

_AGENTS = "--dashboard_agent_command", "--runtime_env_agent_command"
_SETUP_WORKER = Path(ray.__file__).parent / "_private" / "workers" / "setup_worker.py"


@contextmanager
def small_ray() -> Iterator[None]:
    """Have `ray.init` start a small Ray meanwhile.

    Without autoscaler, dashboard, and the process that sends workers' logs to the driver: each is a Python that
    imports Ray, and takes a second of a core while the run starts. Its workers start without importing Ray once more,
    and its agents end with the raylet, however that ends.
    """
    with ExitStack() as undo:
        for owner, name, change in _changes():
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, change)
        yield


def _changes() -> list[tuple[Any, str, Callable[..., Any]]]:
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

    def start_ray_process(command: list[str], *args: Any, **options: Any) -> Any:
        return start([_argument(text) for text in command] if sys.platform == "linux" else command, *args, **options)

    return [
        (services, "start_ray_process", start_ray_process),
        (node.Node, "start_monitor", _nothing),
        (node.Node, "start_log_monitor", _nothing),
        (node.Node, "start_api_server", _no_page),
    ]


def _required(function: Callable[..., Any]) -> list[str]:
    """The parameters that must be given."""
    return [name for name, one in inspect.signature(function).parameters.items() if one.default is one.empty]


def _argument(text: str) -> str:
    """An argument of a raylet, with its commands for agents and workers changed; any other is returned as it is."""
    name, _, value = text.partition("=")
    if name in _AGENTS:
        return f"{name}={list2cmdline([sys.executable, '-I', '-S', ends_with_parent.__file__])} {value}"
    if name == "--python_worker_command":
        return text.replace(list2cmdline([str(_SETUP_WORKER)]), list2cmdline([setup_worker.__file__]))
    return text


def _nothing(node: Any) -> None:
    """Neither a Ray of one node nor its driver has a use for this process."""


def _no_page(node: Any, **_: Any) -> None:
    node._webui_url = ""
