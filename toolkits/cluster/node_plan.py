"""Whether this node is the head or a worker of a Ray cluster, from arguments and environment variables."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil
from membership import DEFAULT_PORT

DESCRIPTION = """\
Start Ray on this node, and return when the node is part of the cluster. Does nothing if it already is. Exit code 1,
with the reason, if the head cannot be reached or the node does not join in time.

Which node this is, the first of these that is given:
  head, worker as the first word; --head; --address HOST[:PORT] (a worker)
  NODE_RANK, RANK or SLURM_NODEID: 0 is the head
Where the head is:
  --address HOST[:PORT], or MASTER_ADDR and MASTER_PORT (6379)

Every other argument goes to ray start: --num-cpus=8, --num-gpus=4, --block (stay in the foreground), ...
"""
EPILOG = """\
These variables are set for Ray and its workers unless they are already: RAY_AUTH_MODE=token (the head makes a token if
there is none), RAY_health_check_* (a killed node is noticed within about 5 s), GLOO_SOCKET_IFNAME and
NCCL_SOCKET_IFNAME (the interface of this node's address), RAY_USAGE_STATS_ENABLED=0.
"""
RANKS = ("NODE_RANK", "RANK", "SLURM_NODEID")


class StartError(RuntimeError):
    """This node cannot start, or did not join; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Head or worker, and how to start Ray on it."""

    head: str | None
    """``host[:port]`` that a worker joins; None: this is the head."""
    port: int
    """Port of the head."""
    own_ip: str | None
    """IP address by which Ray knows this node; None: that of the interface towards the head."""
    timeout: float
    block: bool
    rest: tuple[str, ...]
    """Further arguments for ``ray start``."""


def read_plan(argv: Sequence[str], env: Mapping[str, str]) -> Plan:
    """Read arguments and variables.

    Raises:
        StartError: they do not tell whether this is the head, or where the head is.
    """
    parser = argparse.ArgumentParser(
        "start_ray.sh [head|worker]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--head", action="store_true", help="this node is the head")
    parser.add_argument("--address", metavar="HOST[:PORT]", help="of the head: this node joins it")
    parser.add_argument("--port", type=int, help="of the head (MASTER_PORT, else 6379)")
    parser.add_argument("--node-ip-address", metavar="IP", help="of this node, where the guess is wrong")
    parser.add_argument("--timeout", type=float, default=300, help="seconds to wait for the head, and to join (300)")
    parser.add_argument("--block", action="store_true", help="stay until Ray ends, for srun and containers")
    role = argv[0] if argv and argv[0] in ("head", "worker") else None
    options, rest = parser.parse_known_args(argv[1:] if role else argv)
    is_head = _is_head(role, options.head, options.address, env)
    address = None if is_head else options.address or env.get("MASTER_ADDR")
    if not is_head and not address:
        raise StartError("a worker must know the head: set MASTER_ADDR, or give --address HOST:PORT")
    port = options.port or int(env.get("MASTER_PORT") or DEFAULT_PORT)
    if address and ":" not in address:
        address = f"{address}:{port}"
    return Plan(
        head=address,
        port=port,
        own_ip=options.node_ip_address or (_own_address(env.get("MASTER_ADDR")) if is_head else None),
        timeout=options.timeout,
        block=options.block,
        rest=tuple(rest),
    )


def _is_head(role: str | None, flag: bool, address: str | None, env: Mapping[str, str]) -> bool:
    head = role == "head" or flag
    if head and (address or role == "worker"):
        raise StartError("--address and worker are for the nodes that join a head; leave them out for the head")
    if head or role or address:
        return head
    for name in RANKS:
        if rank := env.get(name):
            return int(rank) == 0
    raise StartError(
        "is this the head or a worker? Give head or worker as the first argument, or set RANK (0 is the head)"
    )


def _own_address(host: str | None) -> str | None:
    """Return ``host`` as an address of this machine that others can reach; None if it is not this machine."""
    try:
        ip = socket.gethostbyname(host) if host else ""
    except OSError:
        return None
    return ip if ip in interfaces() and not ip.startswith("127.") else None


def interfaces() -> dict[str, str]:
    """Return the network interface of each IPv4 address of this machine."""
    found = psutil.net_if_addrs().items()
    return {entry.address: name for name, entries in found for entry in entries if entry.family == socket.AF_INET}
