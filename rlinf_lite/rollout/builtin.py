"""The builtin engine: the transformers model over a cache by position, with counter-based sampling, on CPU or GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlinf_lite import numerics
from rlinf_lite.models import attention
from rlinf_lite.models.head import MIN_ROWS, logits_of, logprobs_of
from rlinf_lite.models.logits import logit_transform, output_layer
from rlinf_lite.models.segments import FlatTokens
from rlinf_lite.rollout.batches import grouped, rng_keys
from rlinf_lite.rollout.sampling import draw, penalize_repetition
from rlinf_lite.rollout.slots import KeysValues, Prefill, Slots
from rlinf_lite.types import GenerationBatch, Group, Response
from rlinf_lite.weights.names import named_weights
from rlinf_lite.weights.pieces import WeightPiece


@dataclass
class _Rows:
    """The R unfinished rows, in the order of their slots."""

    origin_R: np.ndarray
    """Row of the batch that each of them is."""
    position_R: np.ndarray
    """Position of the next token."""
    t_R: np.ndarray
    """Index of the next token in its response."""
    logits_RV: Tensor
    seen_RV: Tensor | None
    """bool: tokens of prompt and response so far; None without a repetition penalty."""

    def join(self, other: _Rows) -> _Rows:
        """These rows and, behind them, others."""
        return _Rows(
            np.concatenate([self.origin_R, other.origin_R]),
            np.concatenate([self.position_R, other.position_R]),
            np.concatenate([self.t_R, other.t_R]),
            torch.cat([self.logits_RV, other.logits_RV]),
            None if self.seen_RV is None or other.seen_RV is None else torch.cat([self.seen_RV, other.seen_RV]),
        )


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
        self._transform, self._head = logit_transform(model), output_layer(model)
        attention.use(model)
        self._eos = np.array(sorted(eos_ids), dtype=np.int64)
        self._return_logprobs, self._max_rows = return_logprobs, max_rows
        self._slots: Slots | None = None
        """Of the last batch, for the next one."""
        self._targets = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        with torch.inference_mode():
            nothing = FlatTokens.none(self._device)
            attention.hidden_states(model, nothing.ids_N, nothing.positions_N, nothing.layout)

    @torch.no_grad()
    def load_weights(self, weights: Iterable[WeightPiece]) -> None:
        for name, first_row, rows in weights:
            target = self._targets[name]
            if target.dim():
                target[first_row : first_row + rows.shape[0]].copy_(rows)
            else:
                target.copy_(rows.reshape(()))

    def held_weights(self) -> Iterator[tuple[str, Tensor]]:
        return named_weights(self._model)

    def sleep(self) -> None:
        pass  # the config refuses rollout.enable_sleep with this engine

    def close(self) -> None:
        self._targets.clear()

    @torch.inference_mode()
    def generate(self, batch: GenerationBatch) -> list[Group]:
        sampling = batch.sampling
        num_rows = len(batch.prompts) * batch.group_size
        tokens = np.zeros((num_rows, sampling.max_new_tokens), dtype=np.int64)
        logprobs = np.zeros(tokens.shape, dtype=np.float32)
        lengths, finished = np.zeros(num_rows, dtype=np.int64), np.zeros(num_rows, dtype=np.bool_)
        keys, waiting = rng_keys(batch), _Waiting(self, batch, self._take_slots(num_rows))
        rows: _Rows | None = None
        while rows is not None or waiting.num_left:
            rows = waiting.admit(rows)
            drawn = self._draw(rows, batch, keys)
            drawn_R = drawn.cpu().numpy()
            tokens[rows.origin_R, rows.t_R] = drawn_R
            if self._return_logprobs:
                temperature = sampling.temperature if sampling.do_sample else 1.0
                logprobs[rows.origin_R, rows.t_R] = logprobs_of(rows.logits_RV, drawn, temperature).cpu().numpy()
            ended_R = np.isin(drawn_R, self._eos)
            leaves_R = ended_R | (rows.t_R + 1 == sampling.max_new_tokens)
            lengths[rows.origin_R[leaves_R]] = rows.t_R[leaves_R] + 1
            finished[rows.origin_R[ended_R]] = True
            rows = self._grow(rows, drawn, ~leaves_R, waiting.slots)
        self._slots = waiting.slots
        return self._collect(batch, tokens, logprobs, lengths, finished)

    def _take_slots(self, num_rows: int) -> Slots:
        """Memory of the last batch if it is large enough, and no error left it as it was."""
        slots, self._slots = self._slots, None
        needed = min(num_rows, self._max_rows)
        if slots is None or slots.num_rows < needed:
            return Slots(needed, self._device)
        slots.start_batch()
        return slots

    def _draw(self, rows: _Rows, batch: GenerationBatch, keys: np.ndarray) -> Tensor:
        logits = rows.logits_RV
        if rows.seen_RV is not None:
            logits = penalize_repetition(logits, rows.seen_RV, batch.sampling.repetition_penalty)
        return draw(logits, batch.sampling, keys[rows.origin_R], rows.t_R)

    def _grow(self, rows: _Rows, drawn: Tensor, stays_R: np.ndarray, slots: Slots) -> _Rows | None:
        """Keep the unfinished rows, and run the model on the tokens they drew; None if there are none."""
        order = np.flatnonzero(stays_R)
        num, position_R, seen = len(order), rows.position_R, rows.seen_RV
        if num == 0:
            return None
        if num < len(stays_R):  # the last rows move to the slots of those that leave
            gaps, movers = np.flatnonzero(~stays_R[:num]), num + np.flatnonzero(stays_R[num:])
            order = np.arange(num)
            order[gaps] = movers
            slots.move(self._tensor(movers), self._tensor(gaps))
            index = self._tensor(order)
            drawn, position_R = drawn[index], position_R[order]
            seen = None if seen is None else seen[index]
        if seen is not None:
            seen = seen.scatter(1, drawn[:, None], True)
        missing = max(0, MIN_ROWS - num)  # rows that nobody reads, in slots that nobody has
        positions = slots.start_step(np.pad(position_R, (0, missing)))
        ids = torch.nn.functional.pad(drawn, (0, missing))
        logits = self._logits(attention.hidden_states(self._model, ids, positions, slots)[:num])
        return _Rows(rows.origin_R[order], position_R + 1, rows.t_R[order] + 1, logits, seen)

    def _logits(self, hidden_RD: Tensor) -> Tensor:
        return logits_of(hidden_RD, self._head.weight, self._head.bias, self._transform)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device)

    def _collect(
        self,
        batch: GenerationBatch,
        tokens: np.ndarray,
        logprobs: np.ndarray,
        lengths: np.ndarray,
        finished: np.ndarray,
    ) -> list[Group]:
        sampled = [tokens[row, :length].copy() for row, length in enumerate(lengths.tolist())]
        texts = self._tokenizer.batch_decode([ids.tolist() for ids in sampled], skip_special_tokens=True)
        all_true = np.ones(tokens.shape[1], dtype=np.bool_)
        responses = [
            Response(
                sample_index=row % batch.group_size,
                token_ids=ids,
                loss_mask=all_true[: len(ids)].copy(),
                logprobs=logprobs[row, : len(ids)].copy() if self._return_logprobs else None,
                finished=bool(finished[row]),
                text=texts[row],
                weights_step=batch.weights_step,
            )
            for row, ids in enumerate(sampled)
        ]
        return grouped(batch, responses)


class _Waiting:
    """The rows of a batch that are not decoded yet, in order, and the slots that they will get."""

    def __init__(self, engine: BuiltinEngine, batch: GenerationBatch, slots: Slots) -> None:
        self._engine, self._batch, self.slots = engine, batch, slots
        self._prompts = [prompt.problem.prompt_ids for prompt in batch.prompts]
        self.num_left = len(self._prompts) * batch.group_size
        self._next = 0
        self._held: tuple[Tensor, dict[int, KeysValues]] | None = None
        """Logits [1, V], keys and values of the prompt of which some rows wait, while others do not."""

    def admit(self, rows: _Rows | None) -> _Rows:
        """Add rows to those that are decoded, if enough have left for it to be worth a forward pass."""
        free = self._engine._max_rows - (0 if rows is None else len(rows.origin_R))
        if self.num_left and (rows is None or free >= max(1, self._engine._max_rows // 4)):
            for added in self._added(0 if rows is None else len(rows.origin_R), min(free, self.num_left)):
                rows = added if rows is None else rows.join(added)
        assert rows is not None
        return rows

    def _added(self, first: int, num: int) -> Iterator[_Rows]:
        """The next ``num`` rows, in the slots from ``first`` on: those whose prompt is held, then those of others."""
        group = self._batch.group_size
        if within := self._next % group:
            rest = min(num, group - within)
            yield self._of_held(first, rest)
            first, num = first + rest, num - rest
        if num:
            yield self._of_new(first, num)

    def _of_held(self, first: int, num: int) -> _Rows:
        assert self._held is not None
        logits, held = self._held
        for layer, (keys, values) in held.items():
            self.slots.store(layer, first, (keys.expand(num, -1, -1, -1), values.expand(num, -1, -1, -1)))
        return self._rows(num, logits.expand(num, -1))

    def _of_new(self, first: int, num: int) -> _Rows:
        group, start = self._batch.group_size, self._next // self._batch.group_size
        prompt_R = np.arange(num) // group
        prompts = self._prompts[start : start + int(prompt_R[-1]) + 1]
        prefill = Prefill(prompts, prompt_R, self.slots, first)
        hidden = attention.hidden_states(self._engine._model, prefill.ids_N, prefill.positions_N, prefill)
        logits_PV = self._engine._logits(hidden[prefill.last_P])
        self._held = logits_PV[-1:], prefill.held
        return self._rows(num, logits_PV[self._engine._tensor(prompt_R)])

    def _rows(self, num: int, logits_RV: Tensor) -> _Rows:
        origin_R = np.arange(self._next, self._next + num)
        prompts = [self._prompts[row // self._batch.group_size] for row in origin_R]
        self._next, self.num_left = self._next + num, self.num_left - num
        seen = None
        if self._batch.sampling.repetition_penalty != 1.0:
            seen = torch.zeros(logits_RV.shape, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                seen[row, list(prompt)] = True
            seen = seen.to(logits_RV.device)
        lengths_R = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        return _Rows(origin_R, lengths_R, np.zeros(num, dtype=np.int64), logits_RV, seen)
