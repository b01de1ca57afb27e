"""The weights in a DCP directory: a section of a checkpoint, or a model's state dict saved by itself.

No object in the directory is unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rlinf_lite.checkpoint import StateMismatch
from rlinf_lite.checkpoint.formats.dcp_reader import ShardReader, check_size
from rlinf_lite.checkpoint.storage import StoragePath
from rlinf_lite.weights.dcp_names import best_prefix, of_model
from rlinf_lite.weights.names import WeightNames, listed


class DcpWeights:
    """A `WeightSource` over a DCP directory."""

    def __init__(
        self,
        directory: StoragePath,
        names: WeightNames,
        *,
        tied: Mapping[str, str] | None = None,
        base: str = "the base model",
    ) -> None:
        """
        Args:
            names: of the base model; the prefix of the names in the directory is found by comparing with them.
            tied: ties of the model that was trained (alias -> name), where the checkpoint records them.
            base: what the base model is called in messages.

        Raises:
            StateMismatch: the directory holds another model; lists weights that are missing, extra, or of another
                shape, or names a tie that the two models do not share.
            UnsafeCheckpoint, DamagedCheckpoint: it cannot be read.
        """
        self.directory = directory
        self.shapes: Mapping[str, tuple[int, ...]] = names.shapes
        self._reader = ShardReader(directory)
        held = {
            name: entry
            for name, entry in self._reader.metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._prefix = best_prefix(held, names.shapes)
        self._entries = {
            name.removeprefix(self._prefix): entry for name, entry in held.items() if of_model(name, self._prefix)
        }
        check_size(directory, self._entries)
        if problems := self._differences(names, tied or {}):
            raise StateMismatch(
                f"{directory} is a checkpoint of another model than {base}: {'; '.join(problems)}; "
                "give the model that the run started from"
            )
        self._check_ties(names)

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].properties.dtype

    def read(self, name: str) -> Tensor:
        """One whole tensor, joined from all shards, in CPU memory.

        Raises:
            UnsafeCheckpoint, DamagedCheckpoint: its bytes are not a tensor, or cannot be read.
        """
        tensor = torch.empty(self._shape(name), dtype=self.dtype(name))
        self._reader.read({f"{self._prefix}{name}": tensor})
        return tensor

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name].size)

    def _differences(self, names: WeightNames, tied: Mapping[str, str]) -> list[str]:
        """Why the directory's tensors are not the weights of the base model, one problem per entry."""
        missing = [f"{name}{_tie_note(name, tied)}" for name in names.shapes if name not in self._entries]
        extra = sorted(name for name in self._entries if name not in names.shapes and name not in names.tied)
        reshaped = [
            f"{name} is {list(self._shape(name))}, the base model's is {list(wanted)}"
            for name in sorted(self._entries)
            if (wanted := names.shapes.get(names.tied.get(name, name))) is not None and self._shape(name) != wanted
        ]
        problems = []
        if missing:
            problems.append(f"missing: {listed(missing)}")
        if extra:
            problems.append(f"not in the base model: {listed(extra)}")
        if reshaped:
            problems.append(listed(reshaped))
        return problems

    def _check_ties(self, names: WeightNames) -> None:
        for alias, name in names.tied.items():
            if alias in self._entries and not torch.equal(self.read(alias), self.read(name)):
                raise StateMismatch(
                    f"{self.directory}: {alias} differs from {name}, which the base model ties it to; "
                    "give a base model whose config.json says tie_word_embeddings: false"
                )


def _tie_note(name: str, tied: Mapping[str, str]) -> str:
    return f" (tied to {tied[name]} in the checkpoint, but not in the base model)" if name in tied else ""
