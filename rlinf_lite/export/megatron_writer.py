"""Writes Megatron's files from whole Hugging Face tensors, of any source, for any number of tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlinf_lite.checkpoint import Lazy
from rlinf_lite.checkpoint.identify import MEGATRON_TRACKER
from rlinf_lite.export.megatron_path import RELEASE
from rlinf_lite.weights.megatron.architecture import VOCAB_DIVISOR, Architecture
from rlinf_lite.weights.megatron.content import arguments, model_file, optimizer_file
from rlinf_lite.weights.megatron.files import MODEL_FILE, OPTIMIZER_FILE, PARTS
from rlinf_lite.weights.megatron.mapping import Partition, Weight, weights
from rlinf_lite.weights.megatron.packing import slots
from rlinf_lite.weights.source import WeightSource


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSource:
    """Adam's state by Hugging Face names, and what else Megatron's files say of an optimizer."""

    read: Callable[[str, str], Tensor]
    """One whole tensor of a part (``param``, ``exp_avg``, ``exp_avg_sq``), by part and name."""
    entries: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of the model's file: ``optimizer``, ``opt_param_scheduler``, ``rlinf_lite``."""


class ConvertedFiles:
    """A `FileState` to be saved, whose tensors are made one by one when they are written."""

    def __init__(
        self,
        source: WeightSource,
        arch: Architecture,
        *,
        tensor_parallel: int,
        dtype: torch.dtype,
        model: Mapping[str, Any],
        optimizer: OptimizerSource | None = None,
        vocab_divisor: int = VOCAB_DIVISOR,
    ) -> None:
        """
        Args:
            dtype: of the parameters.
            model: what is `described` of it.
            optimizer: None writes weights alone, as Megatron's ``release``.
        """
        self._source, self._dtype, self._optimizer = source, dtype, optimizer
        self._partition = Partition.of(arch, tensor_parallel, vocab_divisor)
        self._args = arguments(self._partition, dtype=dtype, model=model, vocab_divisor=vocab_divisor)

    def files(self, step: int) -> dict[str, object]:
        directory = RELEASE if self._optimizer is None else f"iter_{step:07d}"
        found: dict[str, object] = {MEGATRON_TRACKER: (RELEASE if self._optimizer is None else str(step)).encode()}
        for rank in range(self._partition.size):
            of_rank = f"{directory}/mp_rank_{rank:02d}"
            more = {} if self._optimizer is None else self._optimizer.entries
            found[f"{of_rank}/{MODEL_FILE}"] = model_file(step, self._args, self._model(rank), **more)
            if self._optimizer is not None:
                found[f"{of_rank}/{OPTIMIZER_FILE}"] = self._flat(rank, self._optimizer)
        return found

    def load(self, names: Collection[str], read: Callable[[str], object], *, weights_only: bool) -> bool:
        raise AssertionError("is only saved")

    def _model(self, rank: int) -> dict[str, Lazy]:
        def lazy(weight: Weight) -> Lazy:
            def make() -> Tensor:
                whole = [self._source.read(name) for name in weight.sources]
                return self._partition.shard(weight, whole, rank).to(self._dtype)

            return Lazy(shape=self._partition.shape(weight), dtype=self._dtype, make=make)

        return {weight.name: lazy(weight) for weight in weights(self._partition.arch)}

    def _flat(self, rank: int, optimizer: OptimizerSource) -> dict[Any, Any]:
        """The content of a rank's optimizer file."""
        places = slots(self._partition.shapes())
        by_name = {weight.name: weight for weight in weights(self._partition.arch)}

        def lazy(part: str) -> Lazy:
            def make() -> Tensor:
                flat = torch.zeros(places[-1].stop)
                for slot in places:
                    weight = by_name[slot.name]
                    whole = [optimizer.read(part, name) for name in weight.sources]
                    flat[slot.start : slot.stop] = self._partition.shard(weight, whole, rank).reshape(-1)
                return flat

            return Lazy(shape=(places[-1].stop,), dtype=torch.float32, make=make)

        parts = {part: lazy(part) for part in PARTS}
        return optimizer_file(parts, dtype=self._dtype, num_floats=places[-1].stop)
