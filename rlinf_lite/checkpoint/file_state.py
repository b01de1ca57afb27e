"""State that is saved as files of its own layout, and not as DCP shards: Megatron's, for example.

The files get the same commit protocol, hashes and verification as DCP shards; what is in them is up to the state.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch


@dataclass(frozen=True, slots=True)
class Copied:
    """In place of a tensor in a file's content: nobody changes this one, so `Checkpointer.fence` ignores it."""

    tensor: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Lazy:
    """In place of a tensor in a file's content: one that is made when it is written, and freed afterwards."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]
    """Called in the save's own thread. `Checkpointer.fence` ignores it."""


@runtime_checkable
class FileState(Protocol):
    """One rank's state as files. Its methods are collective over the ranks of the section.

    The RNG state of each rank belongs to it: the checkpoint adds none.
    """

    def files(self, step: int) -> dict[str, object]:
        """Return the files that this rank writes; no two ranks write the same one.

        Returns:
            By path within the section (``iter_0000050/mp_rank_00/distrib_optim.pt``): bytes, written as they are, or
            what ``torch.save`` is to write: nests of plain values, dicts, ``argparse.Namespace``, numpy arrays, torch
            types, and tensors (`Copied`, `Lazy`). Larger tensors are read later, in the background, and must not change
            before `Checkpointer.fence` returns; everything else is copied at once.
        """

    def load(self, names: Collection[str], read: Callable[[str], object], *, weights_only: bool) -> bool:
        """Fill the live state from the files of a checkpoint. Their hashes are verified already.

        A rank that raises must do so before the others wait for it in a collective.

        Args:
            names: all files of the section, written by any number of ranks.
            read: returns the content of one of them: bytes, if its name does not end in ``.pt``. Tensors are views of
                the mapped file: copy from them.
            weights_only: leave optimizer state, counters and RNG state as they are.

        Returns:
            Whether this rank's own RNG state was restored. If not, the caller derives a new one.

        Raises:
            StateMismatch: the files hold another model or optimizer; says how.
            DamagedCheckpoint: they lack something that every such checkpoint has.
        """
