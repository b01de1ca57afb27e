"""The weights in a checkpoint of Megatron's layout under their Hugging Face names, one at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from rlinf_lite.checkpoint import StateMismatch
from rlinf_lite.weights.megatron.files import PARTS, MegatronFiles
from rlinf_lite.weights.megatron.mapping import Partition, Weight, weights
from rlinf_lite.weights.names import WeightNames

PARAM = PARTS[0]


class MegatronWeights:
    """A `WeightSource` over Megatron's files. Padding of the vocabulary is left out."""

    def __init__(self, files: MegatronFiles, names: WeightNames, *, part: str | None = None) -> None:
        """
        Args:
            names: of the model in Hugging Face's form.
            part: one of the optimizer's `PARTS` in place of the parameters: its float32 parameters, or a moment.

        Raises:
            StateMismatch: the model has weights that Megatron's does not have.
        """
        self.files, self.shapes = files, names.shapes
        self._part = part
        self._whole = Partition(arch=files.partition.arch, size=1, padded_vocab_size=files.partition.padded_vocab_size)
        self._weight = {source: weight for weight in weights(self._whole.arch) for source in weight.sources}
        if missing := sorted(names.shapes.keys() - self._weight.keys()):
            raise StateMismatch(f"the model has {missing[0]}, which Megatron's model of this kind does not have")
        self._joined: tuple[Weight | None, dict[str, Tensor]] = None, {}

    def dtype(self, name: str) -> torch.dtype:
        if self._part is not None:
            return torch.float32
        return self.files.parameter(self._weight[name], self.files.partition, 0).dtype

    def read(self, name: str) -> Tensor:
        weight = self._weight[name]
        if self._joined[0] is not weight:  # queries, keys and values are one tensor there
            self._joined = weight, self._whole.join(weight, [self._read(weight)])
        return self._joined[1][name]

    def _read(self, weight: Weight) -> Tensor:
        if self._part is None:
            return self.files.parameter(weight, self._whole, 0)
        return self.files.optimizer(self._part, weight, self._whole, 0)
