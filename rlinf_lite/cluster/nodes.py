"""Which nodes of the cluster are dead or being drained. Asks Ray's GCS, so check `RayPulse` first."""

from __future__ import annotations

import math
from collections.abc import Iterable

import ray
from ray._private.state import GlobalState, state

from rlinf_lite.cluster.guard import guard


def dead(node_ids: Iterable[str]) -> set[str]:
    """Return those of these nodes that Ray has declared dead, or no longer knows.

    Ray notices a killed node by missed health checks: after 10-20 s with its defaults.
    """
    alive = {node["NodeID"] for node in guard.ask_head(ray.nodes) if node["Alive"]}
    return set(node_ids) - alive


def draining(node_ids: Iterable[str]) -> dict[str, float]:
    """Return those of these nodes that are being drained, with their deadline in Unix seconds; inf if it has none."""
    wanted = set(node_ids)
    deadlines = _draining().items()
    return {node: deadline / 1000 if deadline else math.inf for node, deadline in deadlines if node in wanted}


def _draining() -> dict[str, int]:
    """Return deadlines in milliseconds. Not in Ray's public interface, and not in every Ray that we support."""
    return guard.ask_head(state.get_draining_nodes) if "get_draining_nodes" in vars(GlobalState) else {}
