"""All ranks: imports megatron-core once, then one fork per rank runs the programs that it is handed.

Run by `runpy` in a new process, with ``PORT`` and ``NUM_RANKS``.
"""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from rlinf_lite import numerics, rng

sys.path.insert(0, str(Path(__file__).parent))


def fork_ranks(port: int, num_ranks: int) -> None:
    os.setpgid(0, 0)
    numerics.fix("cpu")
    import rank_programs  # noqa: F401

    for rank in range(num_ranks):
        if not os.fork():
            serve(port, rank)
    os.wait()  # a rank that ends has died: the others cannot continue
    os.killpg(0, signal.SIGKILL)


def serve(port: int, rank: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(hours=1))
    for number in itertools.count():
        world_size, program, arguments = pickle.loads(store.get(f"task{number}"))
        if rank < world_size:
            # A connection of the group's own: the group gives its timeout to the store.
            group_store = dist.PrefixStore(f"group{number}", dist.TCPStore("127.0.0.1", port, is_master=False))
            dist.init_process_group(
                "gloo", store=group_store, rank=rank, world_size=world_size, timeout=timedelta(minutes=1)
            )
            answer = attempt(rank, world_size, program, arguments)
            # Before the group is gone: then others fail, too, and theirs is not the first error.
            store.set(f"task{number}.rank{rank}", pickle.dumps(answer))
            dist.destroy_process_group()


def attempt(
    rank: int, world_size: int, program: str, arguments: dict[str, Any]
) -> tuple[Any, BaseException | None, float]:
    """(result, None, now), or (None, the error with its traceback as a note, when it was raised)."""
    import rank_programs

    try:
        rng.reseed(1, 0, rank)
        return getattr(rank_programs, program)(**arguments), None, time.monotonic()
    except Exception as error:
        when = time.monotonic()
        error.add_note(f"on rank {rank} of {world_size}:\n{traceback.format_exc()}")
        return None, error, when


if __name__ == "ranks":
    fork_ranks(PORT, NUM_RANKS)  # noqa: F821
