"""Memory that processes of one machine share. It is gone with the last of them, however they end."""

from __future__ import annotations

import os
import secrets
import sys

import psutil


def make_memory(num_bytes: int) -> int:
    """Make memory that `RemoteDescriptor` lets others open; returns its file descriptor. All of it is there at once.

    Raises:
        OSError: there is not enough, or this system has no such memory.
    """
    if sys.platform != "linux":
        raise OSError("only Linux has shared memory without a name")
    if num_bytes > (free := psutil.virtual_memory().available):  # Linux would end processes until there is
        raise OSError(f"{num_bytes} bytes are needed, and {free} are free")
    descriptor = os.memfd_create(f"rlinf_lite-{secrets.token_hex(16)}", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
