"""One rank: joins the test's store, runs the programs it is handed, each in a process group of its own.

Run by `runpy` in a new process, with ``PORT`` and ``RANK``.
"""

from __future__ import annotations

import gc
import itertools
import pickle
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from rlinf_lite import numerics, rng

sys.path.insert(0, str(Path(__file__).parent))
import rank_programs


def main(port: int, rank: int) -> None:
    numerics.fix("cpu")
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(hours=1))
    for number in itertools.count():
        key, world_size, program, arguments = pickle.loads(store.get(f"rank{rank}.task{number}"))
        # A connection of the group's own: the group gives its timeout to the store.
        group_store = dist.PrefixStore(key, dist.TCPStore("127.0.0.1", port, is_master=False))
        dist.init_process_group(
            "gloo", store=group_store, rank=rank, world_size=world_size, timeout=timedelta(minutes=1)
        )
        answer = attempt(rank, world_size, program, arguments)
        # Before the group is gone: then others fail, too, and theirs is not the first error.
        store.set(f"{key}.rank{rank}", pickle.dumps(answer))
        dist.destroy_process_group()


def attempt(
    rank: int, world_size: int, program: str, arguments: dict[str, Any]
) -> tuple[Any, BaseException | None, float]:
    """(result, None, now), or (None, the error with its traceback as a note, when it was raised)."""
    try:
        rng.reseed(1, 0, rank)
        mesh = init_device_mesh("cpu", (world_size,))
        return getattr(rank_programs, program)(mesh, **arguments), None, time.monotonic()
    except Exception as error:
        when = time.monotonic()
        error.add_note(f"on rank {rank} of {world_size}:\n{traceback.format_exc()}")
        return None, error, when


if __name__ == "rank":
    gc.freeze()  # what is preloaded stays
    main(PORT, RANK)  # noqa: F821
