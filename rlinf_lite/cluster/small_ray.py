"""A Ray of the driver's own without the processes that serve clusters: a run starts sooner, and nobody uses them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray._private import node
from ray._private.parameter import RayParams

from rlinf_lite.cluster.forks import setup_worker


class _SmallNode(node.Node):
    """Without autoscaler, dashboard, and the process that sends workers' logs to the driver.

    Each of them is a Python that imports Ray, and takes a second of a core while the run starts.
    """

    def __init__(self, ray_params: RayParams, *args: Any, **kwargs: Any) -> None:
        if sys.platform == "linux":
            ray_params.setup_worker_path = setup_worker.__file__
        super().__init__(ray_params, *args, **kwargs)

    def start_monitor(self) -> None:
        """Nothing: a Ray of one node stays as it is."""

    def start_log_monitor(self) -> None:
        """Nothing: the driver reads no logs from Ray."""

    def start_api_server(self, **_: Any) -> None:
        """Nothing but to note that there is no page."""
        self._webui_url = ""


@contextmanager
def small_ray() -> Iterator[None]:
    """Have `ray.init` start a small Ray meanwhile."""
    kept = node.Node
    node.Node = _SmallNode  # type: ignore[misc]
    try:
        yield
    finally:
        node.Node = kept  # type: ignore[misc]
