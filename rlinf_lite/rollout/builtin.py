"""The builtin engine: the transformers model with a KV cache and counter-based sampling, on CPU or GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from rlinf_lite import numerics
from rlinf_lite.rollout.batches import grouped, rng_keys
from rlinf_lite.rollout.sampling import draw, penalize_repetition
from rlinf_lite.types import GenerationBatch, Group, Response
from rlinf_lite.weights.pieces import WeightPiece


@dataclass
class _Rows:
    """The R unfinished rows of a batch, and the model's inputs for their next token."""

    origin_R: Tensor
    """Row of the batch that each of them is."""
    mask_RT: Tensor
    """Attention mask over left padding, prompt and the response so far."""
    position_R: Tensor
    """Position id of the next token."""
    logits_RV: Tensor
    seen_RV: Tensor | None
    """bool: tokens of prompt and response so far; None without a repetition penalty."""


class BuiltinEngine:
    """A `RolloutEngine` over one unsharded model.

    Prompts are left-padded and computed once each, their cache is repeated for the group, and rows leave when they
    finish. All of that follows from the generation batch, and so do the bits, with fixed kernels: a program that builds
    an engine itself calls `numerics.fix` first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos_ids: frozenset[int],
        return_logprobs: bool,
    ) -> None:
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._device = next(model.parameters()).device
        numerics.require_fixed(self._device)
        self._eos = torch.tensor(sorted(eos_ids), device=self._device)
        self._return_logprobs = return_logprobs
        self._targets = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    @torch.no_grad()
    def load_weights(self, weights: Iterable[WeightPiece]) -> None:
        for name, first_row, rows in weights:
            target = self._targets[name]
            if target.dim():
                target[first_row : first_row + rows.shape[0]].copy_(rows)
            else:
                target.copy_(rows.reshape(()))

    def sleep(self) -> None:
        pass  # the config refuses rollout.enable_sleep with this engine

    def close(self) -> None:
        self._targets.clear()

    @torch.inference_mode()
    def generate(self, batch: GenerationBatch) -> list[Group]:
        sampling = batch.sampling
        num_rows = len(batch.prompts) * batch.group_size
        tokens = torch.zeros((num_rows, sampling.max_new_tokens), dtype=torch.int64, device=self._device)
        logprobs = torch.zeros(tokens.shape, dtype=torch.float32, device=self._device)
        lengths = torch.full((num_rows,), sampling.max_new_tokens, device=self._device)
        finished = torch.zeros(num_rows, dtype=torch.bool, device=self._device)
        keys = rng_keys(batch)

        rows, cache = self._read_prompts(batch)
        for t in range(sampling.max_new_tokens):
            drawn = self._draw(rows, batch, keys, t)
            tokens[rows.origin_R, t] = drawn
            if self._return_logprobs:
                scaled = rows.logits_RV.float() / (sampling.temperature if sampling.do_sample else 1.0)
                logprobs[rows.origin_R, t] = scaled.log_softmax(-1).gather(1, drawn[:, None])[:, 0]
            ended = torch.isin(drawn, self._eos)
            lengths[rows.origin_R[ended]] = t + 1
            finished[rows.origin_R[ended]] = True
            growing = (~ended).nonzero()[:, 0]
            if t + 1 == sampling.max_new_tokens or not len(growing):
                break
            if len(growing) < len(drawn):
                cache.batch_select_indices(growing)
            rows = self._grow(rows, drawn, growing, cache)
        return self._collect(batch, tokens, logprobs, lengths, finished)

    def _read_prompts(self, batch: GenerationBatch) -> tuple[_Rows, DynamicCache]:
        """Run the model once per prompt, then repeat rows and cache for the group."""
        ids = [torch.tensor(prompt.problem.prompt_ids) for prompt in batch.prompts]
        longest = max(len(row) for row in ids)
        ids_PT = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in ids]).to(self._device)
        mask_PT = torch.stack([torch.arange(longest) >= longest - len(row) for row in ids]).long().to(self._device)
        position_PT = (mask_PT.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self._model.config)
        logits_PV = self._model(
            input_ids=ids_PT,
            attention_mask=mask_PT,
            position_ids=position_PT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        seen = None
        if batch.sampling.repetition_penalty != 1.0:
            counts = torch.zeros(logits_PV.shape, dtype=torch.int64, device=self._device)
            seen = counts.scatter_add(1, ids_PT, mask_PT) > 0
        group = batch.group_size
        cache.batch_repeat_interleave(group)
        return _Rows(
            origin_R=torch.arange(len(ids) * group, device=self._device),
            mask_RT=mask_PT.repeat_interleave(group, 0),
            position_R=(position_PT[:, -1] + 1).repeat_interleave(group, 0),
            logits_RV=logits_PV.repeat_interleave(group, 0),
            seen_RV=None if seen is None else seen.repeat_interleave(group, 0),
        ), cache

    def _draw(self, rows: _Rows, batch: GenerationBatch, keys: np.ndarray, t: int) -> Tensor:
        logits = rows.logits_RV
        if rows.seen_RV is not None:
            logits = penalize_repetition(logits, rows.seen_RV, batch.sampling.repetition_penalty)
        return draw(logits, batch.sampling, keys[rows.origin_R.cpu().numpy()], t)

    def _grow(self, rows: _Rows, drawn: Tensor, growing: Tensor, cache: DynamicCache) -> _Rows:
        """Keep the unfinished rows, and run the model on the tokens they drew."""
        last_R = drawn[growing]
        mask_RT = torch.nn.functional.pad(rows.mask_RT[growing], (0, 1), value=1)
        position_R = rows.position_R[growing]
        logits_RV = self._model(
            input_ids=last_R[:, None],
            attention_mask=mask_RT,
            position_ids=position_R[:, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        seen = None if rows.seen_RV is None else rows.seen_RV[growing].scatter(1, last_R[:, None], True)
        return _Rows(
            origin_R=rows.origin_R[growing],
            mask_RT=mask_RT,
            position_R=position_R + 1,
            logits_RV=logits_RV,
            seen_RV=seen,
        )

    def _collect(
        self, batch: GenerationBatch, tokens: Tensor, logprobs: Tensor, lengths: Tensor, finished: Tensor
    ) -> list[Group]:
        tokens, logprobs = tokens.cpu(), logprobs.cpu()
        sampled = [tokens[row, :length].numpy().copy() for row, length in enumerate(lengths.tolist())]
        texts = self._tokenizer.batch_decode([ids.tolist() for ids in sampled], skip_special_tokens=True)
        responses = [
            Response(
                sample_index=row % batch.group_size,
                token_ids=ids,
                loss_mask=np.ones(len(ids), dtype=np.bool_),
                logprobs=logprobs[row, : len(ids)].numpy().copy() if self._return_logprobs else None,
                finished=bool(finished[row]),
                text=texts[row],
                weights_step=batch.weights_step,
            )
            for row, ids in enumerate(sampled)
        ]
        return grouped(batch, responses)
