"""The engine's model, called in three ways: tokens to logits, a group's prompts, and rows that wait for a slot."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlinf_lite.models import attention
from rlinf_lite.models.attention import Layout
from rlinf_lite.models.head import logits_of
from rlinf_lite.models.logits import logit_transform, output_layer
from rlinf_lite.models.segments import FlatTokens
from rlinf_lite.rollout.llama_layers import LlamaLayers
from rlinf_lite.rollout.packed_layers import PackedLayers
from rlinf_lite.rollout.slots import Cache, KeysValues, Prefill
from rlinf_lite.types import GenerationBatch


class Forward:
    """A model whose attention is that of `models.attention`, with its head."""

    def __init__(self, model: PreTrainedModel) -> None:
        """
        Raises:
            ConfigError: trainer and engine could not compute this architecture alike.
        """
        self.model = model
        self.device = next(model.parameters()).device
        self.transform, self.head = logit_transform(model), output_layer(model)
        attention.use(model)
        self.packed = PackedLayers(model)
        """Of use to a decoder on a CPU, within a ``with`` block."""
        with torch.inference_mode():
            nothing = FlatTokens.none(self.device)
            attention.hidden_states(model, nothing.ids_N, nothing.positions_N, nothing.layout)

    @functools.cached_property
    def layers(self) -> LlamaLayers | None:
        """What stands in for the model's own forward pass. To be asked for when the model has its weights."""
        return LlamaLayers.of(self.model, self.packed) if self.device.type == "cpu" else None

    def hidden(self, ids_N: Tensor, positions_N: Tensor, layout: Layout) -> Tensor:
        """Hidden states [N, D] after the last norm."""
        if self.layers is not None:
            return self.layers.hidden(ids_N, positions_N, layout)
        return attention.hidden_states(self.model, ids_N, positions_N, layout)

    def logits(self, hidden_MD: Tensor, weight: Tensor | None = None) -> Tensor:
        """Logits [M, V]; ``weight`` stands in for the head's own."""
        return logits_of(hidden_MD, self.head.weight if weight is None else weight, self.head.bias, self.transform)


@dataclass(slots=True)
class NewRows:
    """R rows of a batch whose prompt is computed: what is needed to sample their first token."""

    origin_R: np.ndarray
    """Row of the batch that each of them is."""
    length_R: np.ndarray
    """Tokens of its prompt."""
    logits_RV: Tensor
    seen_RV: Tensor | None
    """bool: tokens of the prompt; None without a repetition penalty."""


class Waiting:
    """The rows of a batch that are not decoded yet, in order."""

    def __init__(self, forward: Forward, batch: GenerationBatch, cache: Cache) -> None:
        """
        Args:
            cache: takes keys and values of the prompts.
        """
        self._forward, self._batch, self._cache = forward, batch, cache
        self._prompts = [prompt.problem.prompt_ids for prompt in batch.prompts]
        self.num_left = len(self._prompts) * batch.group_size
        self._next = 0
        self._held: tuple[Tensor, dict[int, KeysValues]] | None = None
        """Logits [1, V], keys and values of the prompt of which some rows wait, while others do not."""

    def worth(self, free: int, max_rows: int) -> bool:
        """Whether enough of ``max_rows`` slots are free for a forward pass over prompts."""
        return self.num_left > 0 and free >= max(1, max_rows // 4)

    def enter(self, slots: Sequence[int] | np.ndarray) -> Iterator[NewRows]:
        """The next rows, one per slot as long as there are any: those whose prompt is held, then those of others."""
        num, group = min(len(slots), self.num_left), self._batch.group_size
        if within := self._next % group:
            rest = min(num, group - within)
            yield self._of_held(slots[:rest])
            slots, num = slots[rest:], num - rest
        if num:
            yield self._of_new(slots[:num])

    def _of_held(self, slots: Sequence[int] | np.ndarray) -> NewRows:
        assert self._held is not None
        logits, held = self._held
        num = len(slots)
        for layer, (keys, values) in held.items():
            self._cache.store(layer, slots, (keys.expand(num, -1, -1, -1), values.expand(num, -1, -1, -1)))
        return self._rows(num, logits.expand(num, -1))

    def _of_new(self, slots: Sequence[int] | np.ndarray) -> NewRows:
        num, group = len(slots), self._batch.group_size
        start, prompt_R = self._next // group, np.arange(num) // group
        prompts = self._prompts[start : start + int(prompt_R[-1]) + 1]
        prefill = Prefill(prompts, prompt_R, self._cache, slots)
        hidden = self._forward.hidden(prefill.ids_N, prefill.positions_N, prefill)
        logits_PV = self._forward.logits(hidden[prefill.last_P])
        self._held = logits_PV[-1:], prefill.held
        return self._rows(num, logits_PV[torch.from_numpy(prompt_R).to(logits_PV.device)])

    def _rows(self, num: int, logits_RV: Tensor) -> NewRows:
        origin_R = np.arange(self._next, self._next + num)
        prompts = [self._prompts[row // self._batch.group_size] for row in origin_R]
        self._next, self.num_left = self._next + num, self.num_left - num
        seen = None
        if self._batch.sampling.repetition_penalty != 1.0:
            seen = torch.zeros(logits_RV.shape, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                seen[row, list(prompt)] = True
            seen = seen.to(logits_RV.device)
        lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        return NewRows(origin_R, lengths, logits_RV, seen)
