"""Finding the processes that a kill means, by id, and ending them with kill -9."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from _job import Launch, descendants, kill
from _plan import ONE_OF_SEVERAL, Kill

if TYPE_CHECKING:  # only a run with --cluster needs it
    from _nodes import Nodes

_WORKER = re.compile(r"ray::(\w+)Group")
_DAEMONS = ("raylet", "gcs_server")


@dataclass(frozen=True, kw_only=True, slots=True)
class Victim:
    name: str
    process: psutil.Process


def strike(
    kill_: Kill, launch: Launch, directory: Path, nodes: Nodes | None, struck: Collection[psutil.Process]
) -> list[Victim]:
    """Kill what ``kill_`` names; returns what died, which is nothing as long as no such process is there.

    Args:
        struck: by earlier kills: they may take a moment to be gone.
    """
    if kill_.victim in ("raylet", "phase") and nodes is not None:
        raylet = nodes.kill_one(kill_.rank, returns=kill_.returns)
        return [] if raylet is None else [Victim(name="raylet", process=raylet)]
    found = [victim for victim in _find(kill_, launch, directory, nodes) if victim.process not in struck]
    if kill_.victim in ONE_OF_SEVERAL:
        found = found[kill_.rank % len(found) :][:1] if found else []
    killed = [victim for victim in found if kill(victim.process)]
    if kill_.victim == "all" and nodes is not None:
        nodes.kill_all()
    return killed


def below(launch: Launch, nodes: Nodes | None) -> list[psutil.Process]:
    """What must not outlive the driver."""
    if nodes is None:
        return descendants(launch.process)
    return [victim.process for victim in _seen(nodes.processes())]


def _find(kill_: Kill, launch: Launch, directory: Path, nodes: Nodes | None) -> list[Victim]:
    """All that ``kill_`` may mean: one of them, except for all at once, and for what ends the command."""
    parent = Victim(name="parent", process=launch.process)
    if kill_.victim == "parent":
        return [parent]
    if kill_.victim in ("driver", "damage", "change", "all"):
        if (process := launch.driver) is None:
            return []
        driver = Victim(name="driver", process=process)
        if kill_.victim == "all":
            return [parent, driver, *_workers(launch, directory, nodes), *_daemons(launch)]
        return [driver] if kill_.victim == "driver" else [parent, driver]
    if kill_.victim == "phase":
        return [victim for victim in _daemons(launch) if victim.name == "raylet"]
    return _daemons(launch) if kill_.victim == "raylet" else _workers(launch, directory, nodes, kill_.victim)


def _daemons(launch: Launch) -> list[Victim]:
    """Of a driver's own Ray."""
    return [
        Victim(name=name, process=each)
        for each in descendants(launch.process)
        if (name := _name(each)).startswith(_DAEMONS)
    ]


def _workers(launch: Launch, directory: Path, nodes: Nodes | None, group: str | None = None) -> list[Victim]:
    """In the order of groups and ranks, where the driver has written them down; else in the order of process ids."""
    found = _listed(directory / "workers.json", launch) or _seen(
        descendants(launch.process) if nodes is None else nodes.processes()
    )
    return [victim for victim in found if group is None or victim.name.startswith(group)]


def _listed(path: Path, launch: Launch) -> list[Victim]:
    """From the driver's list; nothing while it is another driver's. A process id used again is no worker."""
    try:
        listed = json.loads(path.read_text())
    except FileNotFoundError:
        return []
    if (driver := launch.driver) is None or listed["driver"] != driver.pid:
        return []
    found = []
    for worker in listed["workers"]:
        if (process := _process(worker["pid"])) is not None and _command(process).startswith("ray::"):
            found.append(Victim(name=f"{worker['group']} {worker['rank']}", process=process))
    return found


def _seen(below: list[psutil.Process]) -> list[Victim]:
    """By the names of processes, which begin with the group's."""
    found = sorted((match[1].lower(), each.pid, each) for each in below if (match := _WORKER.match(_command(each))))
    return [Victim(name=f"{group} pid {pid}", process=each) for group, pid, each in found]


def _process(pid: int) -> psutil.Process | None:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid)
    return None


def _command(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def _name(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return process.name()
    return ""
