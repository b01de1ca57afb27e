"""How the processes of one process group find each other."""

from __future__ import annotations

import socket

import ray
from torch.distributed import TCPStore

from rlinf_lite.cluster.workers.records import StoreAddress


def serve_store(num_processes: int) -> tuple[TCPStore, StoreAddress]:
    """Open a store for ``num_processes`` on a free port."""
    host: str = ray.util.get_node_ip_address()
    listener = socket.create_server(("", 0))
    port = listener.getsockname()[1]
    store = TCPStore(
        host, port, num_processes, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return store, StoreAddress(host=host, port=port)


def join_store(address: StoreAddress) -> TCPStore:
    """Connect to the store that `serve_store` opened."""
    return TCPStore(address.host, address.port, is_master=False)
