"""The builtin engine: the transformers model over a cache by position, with counter-based sampling, on CPU or GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlinf_lite import numerics
from rlinf_lite.rollout.device_decoder import DeviceDecoder
from rlinf_lite.rollout.forward import Forward
from rlinf_lite.rollout.host_decoder import HostDecoder
from rlinf_lite.types import GenerationBatch, Group
from rlinf_lite.weights.names import named_weights
from rlinf_lite.weights.pieces import WeightPiece, copy_rows


class BuiltinEngine:
    """A `RolloutEngine` over one unsharded model.

    A prompt is computed once for its group. Rows leave when they finish, others take their place. None of that changes
    a bit: a response depends on its prompt, its RNG key and the weights alone, and its log-probs are those that the
    trainer computes (see models/attention.py; on a CPU with one thread). A program that builds an engine itself calls
    `numerics.fix` first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos_ids: frozenset[int],
        return_logprobs: bool,
        max_rows: int,
    ) -> None:
        """
        Args:
            max_rows: rows that are decoded at once, at most.

        Raises:
            ConfigError: trainer and engine could not compute this architecture alike.
        """
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._device = next(model.parameters()).device
        numerics.require_fixed(self._device)
        self._return_logprobs = return_logprobs
        decoder = HostDecoder if self._device.type == "cpu" else DeviceDecoder
        self._decoder = decoder(Forward(model), eos_ids=eos_ids, with_logprobs=return_logprobs, max_rows=max_rows)
        self._targets = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    @torch.no_grad()
    def load_weights(self, weights: Iterable[WeightPiece]) -> None:
        for name, first_row, rows in weights:
            copy_rows(self._targets[name], first_row, rows)

    def held_weights(self) -> Iterator[tuple[str, Tensor]]:
        return named_weights(self._model)

    def sleep(self) -> None:
        pass  # the config refuses rollout.enable_sleep with this engine

    def close(self) -> None:
        self._targets.clear()

    @torch.inference_mode()
    def generate(self, batch: GenerationBatch) -> list[Group]:
        sampled = self._decoder.decode(batch)
        return sampled.groups(batch, self._tokenizer, with_logprobs=self._return_logprobs)
