"""Which Ray this driver belongs to: the cluster that `ray start` left here, a named one, or one of its own."""

from __future__ import annotations

import logging
import os
import socket
import time

import ray
from ray import exceptions as ray_errors

# Where the last `ray start` left the address of its cluster. Not ray.init(address="auto"): that also joins the private
# Ray of any other driver on this machine, and dies with it.
from ray._private.services import find_bootstrap_address

from rlinf_lite.cluster import own_ray
from rlinf_lite.cluster.errors import ClusterError
from rlinf_lite.cluster.placement import parse
from rlinf_lite.config import ClusterConfig
from rlinf_lite.observability.notices import say

REJOIN_VARIABLE = "RLINF_LITE_REJOIN"
"""Environment variable with the address of a cluster that this run was on: it is waited for, nothing else will do."""


def connect(config: ClusterConfig) -> str:
    """Join the cluster that runs, or start one here. Returns its address, or ``local``.

    Raises:
        ClusterError: the cluster that was named, or that this run was on, does not answer, or does not let us in.
    """
    if (address := os.environ.pop(REJOIN_VARIABLE, None)) is not None:
        _wait_for_cluster(address, config.start_timeout)
        os.environ["RAY_ADDRESS"] = address
    wanted = os.environ.get("RAY_ADDRESS", "auto")
    address = find_bootstrap_address(None) if wanted == "auto" else None if wanted == "local" else wanted
    if address is not None and _answers(address):
        _join(address)
        return address
    if address is not None and wanted != "auto":
        raise ClusterError(f"RAY_ADDRESS={wanted}: no Ray cluster answers there; correct it, or unset it")
    own_ray.adopt_orphans()
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, _seats(config)),
        object_store_memory=config.object_store_memory,
        include_dashboard=False,
        logging_level=logging.CRITICAL,
        log_to_driver=False,
    )
    return "local"


def _join(address: str) -> None:
    _show_token()
    try:
        ray.init(address=address, logging_level=logging.CRITICAL, log_to_driver=False)
    except (ray_errors.RayError, ConnectionError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ClusterError(
            f"the Ray cluster at {address} does not let us in: {reason}; all nodes need the same ~/.ray/auth_token, "
            "and RAY_AUTH_MODE as it was for `ray start`; for a Ray of its own: RAY_ADDRESS=local"
        ) from None


def _show_token() -> None:
    """Let Ray use the token that `ray start` uses too: by itself it does so for ``address="auto"`` only."""
    try:
        from ray._private.authentication import authentication_token_setup as setup
    except ImportError:
        return  # a Ray that knows no tokens
    setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _wait_for_cluster(address: str, seconds: float) -> None:
    say(f"waiting for the Ray cluster at {address} (at most cluster.start_timeout={seconds} s)")
    deadline = time.monotonic() + seconds
    while not _answers(address):
        if time.monotonic() > deadline:
            raise ClusterError(f"the Ray cluster at {address}, which this run was on, does not answer any more")
        time.sleep(1)


def _answers(address: str) -> bool:
    """Whether something listens there: Ray itself would ask a cluster that was killed for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True


def _seats(config: ClusterConfig) -> int:
    """CPUs that the placement needs: a Ray of our own is told it has them, since slots are seats, not cores."""
    placement = parse(config.component_placement, os.cpu_count() or 1)
    return len(placement.used) * config.threads_per_worker
