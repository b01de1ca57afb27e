"""The nodes of a Ray cluster, as its GCS lists them; needs no driver and no ``ray.init``."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.exceptions import AuthenticationError, RpcError
from ray_token import HOW, TokenError

from rlinf_lite.ports import connection_error

DEFAULT_PORT = 6379
_PROBE_SECONDS = 5.0


class NoAnswerError(ConnectionError):
    """Nothing answers at the address; the message says what happened instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    id: str
    address: str
    host: str
    is_head: bool
    alive: bool
    death: str
    """Why it is dead, in Ray's words; empty while it lives."""
    resources: dict[str, float]

    def line(self) -> str:
        """``10.0.0.7  node7  16 CPUs  8 GPUs  head``"""
        cpus, gpus = (f"{self.resources.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))
        return f"{self.address}  {self.host}  {cpus}  {gpus}{'  head' if self.is_head else ''}"


def resolve(address: str) -> str:
    """Return ``host[:port]`` as ``ip:port``, as Ray writes it.

    Raises:
        NoAnswerError: the name is not known (yet).
        ValueError: the port is not a number.
    """
    host, _, port = address.partition(":")
    if port and not port.isdigit():
        raise ValueError(f"{address} is not host:port")
    try:
        return f"{socket.gethostbyname(host)}:{port or DEFAULT_PORT}"
    except OSError as error:
        raise NoAnswerError(f"the name {host} cannot be resolved: {error.strerror}") from None


def knock(address: str) -> None:
    """Raise NoAnswerError unless something listens at ``ip:port``. Ray's own clients would try for 40 s."""
    error = connection_error(address, _PROBE_SECONDS)
    if isinstance(error, TimeoutError):
        raise NoAnswerError("no answer: wrong address, or a firewall")
    if error is not None:
        reason = error.strerror if isinstance(error, OSError) else error
        raise NoAnswerError(f"{reason}: no Ray head listens there")


def ask(address: str) -> list[Node]:
    """Return every node that the cluster at ``ip:port`` knows, dead ones included, heads first.

    Raises:
        NoAnswerError: nothing listens there, or it is not Ray.
        TokenError: it refuses this process's token.
    """
    knock(address)
    try:
        found = GcsClient(address=address).get_all_node_info(timeout=_PROBE_SECONDS)
    except AuthenticationError:
        raise TokenError(f"the cluster at {address} refuses this token; {HOW}") from None
    except RpcError as error:
        raise NoAnswerError(f"something listens there, but it does not answer as Ray does: {error}") from None
    return sorted((_node(info) for info in found.values()), key=lambda node: (not node.is_head, node.address))


def _node(info: GcsNodeInfo) -> Node:
    return Node(
        id=info.node_id.hex(),
        address=info.node_manager_address,
        host=info.node_manager_hostname,
        is_head=info.is_head_node,
        alive=info.state == GcsNodeInfo.ALIVE,
        death=info.death_info.reason_message,
        resources=dict(info.resources_total),
    )
