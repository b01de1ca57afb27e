"""Adam's state in a DCP directory, of rlinf_lite or of RLinf, one tensor at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rlinf_lite.checkpoint import StateMismatch
from rlinf_lite.checkpoint.formats.dcp_reader import ShardReader
from rlinf_lite.checkpoint.storage import StoragePath

_PREFIXES = ("optim.", "fsdp_checkpoint.optimizers.state.")
"""What comes before the name of a parameter: in our checkpoints, and in RLinf's."""
_UPDATES = "lr_scheduler.num_updates"


class DcpOptimizer:
    """Adam's state in a DCP directory, by the names of the parameters."""

    def __init__(self, directory: StoragePath) -> None:
        """Raises as `ShardReader`."""
        self._directory, self._reader = directory, ShardReader(directory)
        self._held = self._reader.metadata.state_dict_metadata
        self._prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in self._held)), None)

    @property
    def is_there(self) -> bool:
        """Whether the directory holds any optimizer state."""
        return self._prefix is not None

    def dtype(self, part: str, name: str) -> torch.dtype:
        """The type in which a moment is stored. Raises as `read`."""
        return self._entry(f"{self._prefix}{name}.{part}").properties.dtype

    def read(self, part: str, name: str) -> Tensor:
        """A moment of a parameter, whole.

        Raises:
            StateMismatch: the directory does not have it.
        """
        return self._tensor(f"{self._prefix}{name}.{part}")

    def num_steps(self, names: Sequence[str]) -> int:
        """Optimizer steps that were taken, the same for all parameters.

        Raises:
            StateMismatch: they differ, which Megatron's files cannot hold.
        """
        steps = {int(self._tensor(f"{self._prefix}{name}.step").item()) for name in names}
        if len(steps) != 1:
            raise StateMismatch(
                f"{self._directory}: parameters have taken {sorted(steps)} optimizer steps, not one number"
            )
        return steps.pop()

    def num_updates(self, num_steps: int) -> int:
        """Optimizer steps with the skipped ones; ``num_steps`` where they are not recorded."""
        return int(self._tensor(_UPDATES).item()) if _UPDATES in self._held else num_steps

    def _entry(self, key: str) -> TensorStorageMetadata:
        entry = self._held.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise StateMismatch(f"{self._directory}: has no tensor {key}")
        return entry

    def _tensor(self, key: str) -> Tensor:
        entry = self._entry(key)
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        self._reader.read({key: tensor})
        return tensor
