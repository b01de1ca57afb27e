"""Workers that do not answer: print where they are, and end those that hang."""

from __future__ import annotations

from collections.abc import Sequence

from rlinf_lite.cluster import stacks
from rlinf_lite.cluster.errors import Hung, WorkerHung
from rlinf_lite.observability import log_line
from rlinf_lite.recovery.workers import Workers

Worker = tuple[str, int]
"""Component and rank."""


def end_hung(workers: Workers, hung: Hung) -> list[WorkerHung]:
    """End the workers that hang; returns them as losses. Logs as `end_stopped`."""
    ended = end_stopped(workers, hung.waiting)
    return [
        WorkerHung(group.name, rank, hung.seconds)
        for group in workers.groups
        for component, rank in ended
        if group.component == component
    ]


def end_stopped(workers: Workers, waiting: Sequence[Worker]) -> list[Worker]:
    """Log the stacks of all ``waiting`` workers, and end those that are stopped, or all if none is.

    Returns:
        The workers that were ended.
    """
    locations = {who: location for who in waiting if (location := workers.location(*who)) is not None}
    nodes: dict[str, list[stacks.Process]] = {}
    for location in locations.values():
        nodes.setdefault(location.node_id, []).append(location.process)
    found = {(node, stack.pid): stack for node, on_node in stacks.collect_on(nodes).items() for stack in on_node}
    stopped = []
    for (component, rank), location in locations.items():
        stack = found[location.node_id, location.process.pid]
        lines = "\n".join(f"      {line}" for line in stack.text.splitlines())
        log_line(f"   {component} rank {rank}, process {stack.pid} on {location.address}, {stack.state}:\n{lines}")
        if stack.state in ("stopped", "gone"):
            stopped.append((component, rank))
    ended = stopped or list(waiting)
    for who in ended:
        if who in locations:
            stacks.end_on({locations[who].node_id: [locations[who].process]})
    return ended
