"""Joining a Ray cluster: the one that `ray start` left here, a named one, or a new one of the driver's own."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import ray
from ray import exceptions as ray_errors

# Where the last `ray start` left the address of its cluster. Not ray.init(address="auto"): that also joins the private
# Ray of any other driver on this machine, and dies with it.
from ray._common.utils import get_default_ray_temp_dir
from ray._private.services import find_bootstrap_address

from rlinf_lite.cluster import own_ray
from rlinf_lite.cluster.errors import ClusterError, RayLost
from rlinf_lite.cluster.forks.client import ForkServer
from rlinf_lite.cluster.placement import parse
from rlinf_lite.cluster.small_ray import small_ray
from rlinf_lite.config import ClusterConfig, ConfigError
from rlinf_lite.observability.notices import log_line
from rlinf_lite.ports import connection_error

_PROBE_SECONDS = 5.0
_SOCKET_BYTES = 107
"""Longest path of a Unix socket on Linux."""


def connect(config: ClusterConfig, rejoin: str | None = None, forks: ForkServer | None = None) -> str:
    """Join the cluster that runs, or start one here. Returns its address, or ``local``.

    Args:
        rejoin: address of the cluster that this run was on before: it is waited for, and no other is joined.
        forks: starts the workers of a Ray that is started here, which then has no GPU.

    Raises:
        ClusterError: the cluster that was named, or that this run was on, does not answer, or does not let us in.
    """
    if rejoin is not None:
        _wait_for_cluster(rejoin, config.start_timeout)
        os.environ["RAY_ADDRESS"] = rejoin
    wanted = os.environ.get("RAY_ADDRESS", "auto")
    address = find_bootstrap_address(None) if wanted == "auto" else None if wanted == "local" else wanted
    if address is not None and _answers(address):
        _join(address)
        return address
    if address is not None and wanted != "auto":
        raise ClusterError(f"RAY_ADDRESS={wanted}: no Ray cluster answers there; correct it, or unset it")
    _start(config, forks)
    return "local"


def _start(config: ClusterConfig, forks: ForkServer | None) -> None:
    """Start a Ray of our own.

    Raises:
        ConfigError: ``cluster.object_store_memory`` is more than there is.
        ClusterError: the directory for temporary files cannot hold Ray's sockets.
        RayLost: Ray did not start, for whatever other reason.
    """
    num_cpus = max(os.cpu_count() or 1, _slots(config))
    _check_object_store(config.object_store_memory)
    _check_temp_dir(get_default_ray_temp_dir())
    own_ray.adopt_orphans()
    own_ray.note_start()
    try:
        with small_ray(forks):
            ray.init(
                address="local",
                num_cpus=num_cpus,
                num_gpus=None if forks is None else 0,
                object_store_memory=config.object_store_memory,
                include_dashboard=False,
                logging_level=logging.CRITICAL,
                log_to_driver=False,
            )
    except Exception as error:  # Ray's own code, which raises plain Exception where a node does not start
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise RayLost(
            f"Ray did not start on this machine: {reason}\nIts logs are raylet.* and gcs_server.* in "
            f"{get_default_ray_temp_dir()}/session_latest/logs; a busy machine may only need another try"
        ) from None


def _check_object_store(num_bytes: int | None) -> None:
    """Raises ConfigError if the object store would not fit into shared memory, where Ray keeps it."""
    if num_bytes is None or os.environ.get("RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE") == "1":
        return
    try:
        shared = os.statvfs("/dev/shm")
    except OSError:
        return  # no shared memory to measure: Ray chooses a place
    if num_bytes > (free := shared.f_bavail * shared.f_frsize):
        raise ConfigError(
            f"cluster.object_store_memory={num_bytes}: /dev/shm has {free} bytes free; use less, or null for Ray's "
            "choice, or make /dev/shm larger (docker run --shm-size)"
        )


def _check_temp_dir(directory: str) -> None:
    """Raises ClusterError if Ray cannot make its temporary directory, or sockets in it: another try would not help."""
    variable = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    named = f"{variable}={os.environ[variable]}" if variable in os.environ else "the directory for temporary files"
    there = next(path for path in (Path(directory), *Path(directory).parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ClusterError(
            f"{named}: Ray cannot make its temporary directory {directory}: cannot write in {there}; set RAY_TMPDIR "
            "to a short directory that can be written, for example /tmp"
        )
    longest = f"{directory}/session_2026-01-31_23-59-59_999999_{os.getpid()}/sockets/plasma_store"
    if (over := len(os.fsencode(longest)) - _SOCKET_BYTES) > 0:
        raise ClusterError(
            f"{named}: is {over} bytes too long: Ray makes sockets below it, and a socket's path has at most "
            f"{_SOCKET_BYTES} bytes; set RAY_TMPDIR to a short directory, for example /tmp"
        )


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
    log_line(f"waiting for the Ray cluster at {address} (at most cluster.start_timeout={seconds} s)")
    deadline = time.monotonic() + seconds
    while not _answers(address):
        if time.monotonic() > deadline:
            raise ClusterError(f"the Ray cluster at {address}, which this run was on, does not answer any more")
        time.sleep(1)


def _answers(address: str) -> bool:
    return connection_error(address, _PROBE_SECONDS) is None


def _slots(config: ClusterConfig) -> int:
    """CPUs that the placement needs: a Ray of our own is told it has them, since slots are locations, not cores."""
    placement = parse(config.component_placement, os.cpu_count() or 1, with_critic=True)
    return len(placement.used) * config.threads_per_worker
