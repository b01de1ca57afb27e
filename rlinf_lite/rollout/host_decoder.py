"""Decoding on a CPU: a loop that keeps what it knows of the rows in numpy arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlinf_lite.models.head import logprobs_of
from rlinf_lite.rollout.batches import rng_keys
from rlinf_lite.rollout.forward import Forward, NewRows, Waiting
from rlinf_lite.rollout.output import Sampled
from rlinf_lite.rollout.packed_layers import PackedLayers
from rlinf_lite.rollout.sampling import draw, penalize_repetition
from rlinf_lite.rollout.slots import Slots
from rlinf_lite.types import GenerationBatch


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

    @classmethod
    def of(cls, new: NewRows) -> _Rows:
        return cls(new.origin_R, new.length_R, np.zeros_like(new.length_R), new.logits_RV, new.seen_RV)

    def join(self, other: _Rows) -> _Rows:
        """These rows and, behind them, others."""
        return _Rows(
            np.concatenate([self.origin_R, other.origin_R]),
            np.concatenate([self.position_R, other.position_R]),
            np.concatenate([self.t_R, other.t_R]),
            torch.cat([self.logits_RV, other.logits_RV]),
            None if self.seen_RV is None or other.seen_RV is None else torch.cat([self.seen_RV, other.seen_RV]),
        )


class HostDecoder:
    """Samples the rows of a batch, a token each at a time; unfinished rows keep the first slots."""

    def __init__(self, forward: Forward, *, eos_ids: frozenset[int], with_logprobs: bool, max_rows: int) -> None:
        """
        Args:
            max_rows: rows that are decoded at once, at most.
        """
        self._forward, self._max_rows, self._with_logprobs = forward, max_rows, with_logprobs
        self._eos = np.array(sorted(eos_ids), dtype=np.int64)
        self._packed = PackedLayers(forward.model)
        self._slots: Slots | None = None
        """Of the last batch, for the next one."""

    def decode(self, batch: GenerationBatch) -> Sampled:
        """Sample all rows of ``batch``. Raises NotFinite as `sampling.draw`."""
        with self._packed:
            return self._decode(batch)

    def _decode(self, batch: GenerationBatch) -> Sampled:
        sampling, keys = batch.sampling, rng_keys(batch)
        out = Sampled.empty(len(keys), sampling.max_new_tokens)
        slots = self._take_slots(len(keys))
        waiting = Waiting(self._forward, batch, slots)
        rows: _Rows | None = None
        while rows is not None or waiting.num_left:
            rows = self._admit(rows, waiting)
            drawn = self._draw(rows, batch, keys)
            drawn_R = drawn.numpy()
            out.tokens_NT[rows.origin_R, rows.t_R] = drawn_R
            if self._with_logprobs:
                temperature = sampling.temperature if sampling.do_sample else 1.0
                out.logprobs_NT[rows.origin_R, rows.t_R] = logprobs_of(rows.logits_RV, drawn, temperature).numpy()
            ended_R = np.isin(drawn_R, self._eos)
            leaves_R = ended_R | (rows.t_R + 1 == sampling.max_new_tokens)
            out.length_N[rows.origin_R[leaves_R]] = rows.t_R[leaves_R] + 1
            out.finished_N[rows.origin_R[ended_R]] = True
            rows = self._grow(rows, drawn, ~leaves_R, slots)
        self._slots = slots
        return out

    def _take_slots(self, num_rows: int) -> Slots:
        """Memory of the last batch if it is large enough, and no error left it as it was."""
        slots, self._slots = self._slots, None
        needed = min(num_rows, self._max_rows)
        if slots is None or slots.num_rows < needed:
            return Slots(needed)
        slots.start_batch()
        return slots

    def _admit(self, rows: _Rows | None, waiting: Waiting) -> _Rows:
        """Add rows to those that are decoded, if enough have left for it to be worth a forward pass."""
        num = 0 if rows is None else len(rows.origin_R)
        if rows is None or waiting.worth(self._max_rows - num, self._max_rows):
            for new in waiting.enter(range(num, self._max_rows)):
                rows = _Rows.of(new) if rows is None else rows.join(_Rows.of(new))
        assert rows is not None
        return rows

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
            slots.move(torch.from_numpy(movers), torch.from_numpy(gaps))
            index = torch.from_numpy(order)
            drawn, position_R = drawn[index], position_R[order]
            seen = None if seen is None else seen[index]
        if seen is not None:
            seen = seen.scatter(1, drawn[:, None], True)
        hidden = self._forward.hidden(drawn, slots.start_step(position_R), slots)
        logits = self._forward.logits(hidden, self._packed.weight(self._forward.head, num))
        return _Rows(rows.origin_R[order], position_R + 1, rows.t_R[order] + 1, logits, seen)
