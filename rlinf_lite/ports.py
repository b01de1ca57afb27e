"""Whether something listens at a TCP address."""

from __future__ import annotations

import socket


def connection_error(address: str, seconds: float) -> OSError | ValueError | None:
    """Try to connect; return None if something accepts the connection, else what went wrong.

    For Ray's addresses: its own clients keep asking a cluster that is gone for up to minutes.

    Args:
        address: ``host:port``; an IPv6 host in brackets, and a scheme such as ``ray://`` may come before it.
        seconds: to wait for an answer.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
    except (OSError, ValueError) as error:
        return error
    return None
