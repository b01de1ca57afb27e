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
class _Nodes:
    """The Q different sequences of the unfinished rows: equal ones are computed once."""

    slot_Q: np.ndarray
    """Where the keys and values of each are."""
    position_Q: np.ndarray
    """Position of the next token."""
    logits_QV: Tensor
    seen_QV: Tensor | None
    """bool: tokens of prompt and response so far; None without a repetition penalty."""

    def join(self, other: _Nodes) -> _Nodes:
        """These sequences and, behind them, others."""
        return _Nodes(
            np.concatenate([self.slot_Q, other.slot_Q]),
            np.concatenate([self.position_Q, other.position_Q]),
            torch.cat([self.logits_QV, other.logits_QV]),
            None if self.seen_QV is None or other.seen_QV is None else torch.cat([self.seen_QV, other.seen_QV]),
        )


@dataclass
class _Rows:
    """The R unfinished rows, ordered by their sequence."""

    origin_R: np.ndarray
    """Row of the batch that each of them is."""
    t_R: np.ndarray
    """Index of the next token in its response."""
    node_R: np.ndarray
    """The sequence that each of them is so far."""
    nodes: _Nodes

    @classmethod
    def of(cls, new: NewRows, slots: np.ndarray, group_size: int) -> _Rows:
        """New rows are equal until they draw their first token, if their prompt is the same."""
        _, first_Q, node_R = np.unique(new.origin_R // group_size, return_index=True, return_inverse=True)
        index = torch.from_numpy(first_Q)
        seen = None if new.seen_RV is None else new.seen_RV[index]
        nodes = _Nodes(slots[first_Q], new.length_R[first_Q], new.logits_RV[index], seen)
        return cls(new.origin_R, np.zeros_like(new.length_R), node_R, nodes)

    def join(self, other: _Rows) -> _Rows:
        """These rows and, behind them, others."""
        return _Rows(
            np.concatenate([self.origin_R, other.origin_R]),
            np.concatenate([self.t_R, other.t_R]),
            np.concatenate([self.node_R, len(self.nodes.slot_Q) + other.node_R]),
            self.nodes.join(other.nodes),
        )


_MAX_COPIED = 1 << 24
"""Logits of rows that are copied from those of sequences at a time."""


class HostDecoder:
    """Samples the rows of a batch, a token each at a time. Rows with the same sequence so far are computed once."""

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
            rows = self._admit(rows, waiting, batch.group_size)
            drawn_R = self._draw(rows, batch, keys, out)
            out.tokens_NT[rows.origin_R, rows.t_R] = drawn_R
            ended_R = np.isin(drawn_R, self._eos)
            leaves_R = ended_R | (rows.t_R + 1 == sampling.max_new_tokens)
            out.length_N[rows.origin_R[leaves_R]] = rows.t_R[leaves_R] + 1
            out.finished_N[rows.origin_R[ended_R]] = True
            rows = self._grow(rows, drawn_R, np.flatnonzero(~leaves_R), slots)
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

    def _admit(self, rows: _Rows | None, waiting: Waiting, group_size: int) -> _Rows:
        """Add rows to those that are decoded, if enough have left for it to be worth a forward pass."""
        num = 0 if rows is None else len(rows.origin_R)
        if rows is None or waiting.worth(self._max_rows - num, self._max_rows):
            free = np.arange(num, self._max_rows)  # there are at most as many sequences as rows
            for new in waiting.enter(free):
                slots, free = np.split(free, [len(new.origin_R)])
                more = _Rows.of(new, slots, group_size)
                rows = more if rows is None else rows.join(more)
        assert rows is not None
        return rows

    def _draw(self, rows: _Rows, batch: GenerationBatch, keys: np.ndarray, out: Sampled) -> np.ndarray:
        """Sample a token per row, and note its log-prob."""
        nodes, sampling = rows.nodes, batch.sampling
        logits_QV, drawn_R = nodes.logits_QV, np.empty_like(rows.t_R)
        if nodes.seen_QV is not None:
            logits_QV = penalize_repetition(logits_QV, nodes.seen_QV, sampling.repetition_penalty)
        are_equal = len(nodes.slot_Q) < len(drawn_R)  # some rows; otherwise each has the logits in its place
        at_a_time = max(1, _MAX_COPIED // logits_QV.shape[-1]) if are_equal else len(drawn_R)
        for first in range(0, len(drawn_R), at_a_time):
            part = slice(first, first + at_a_time)
            node = torch.from_numpy(rows.node_R[part]) if are_equal else part
            origin, t = rows.origin_R[part], rows.t_R[part]
            drawn = draw(logits_QV[node], sampling, keys[origin], t)
            drawn_R[part] = drawn.numpy()
            if self._with_logprobs:
                temperature = sampling.temperature if sampling.do_sample else 1.0
                out.logprobs_NT[origin, t] = logprobs_of(nodes.logits_QV[node], drawn, temperature).numpy()
        return drawn_R

    def _grow(self, rows: _Rows, drawn_R: np.ndarray, stays: np.ndarray, slots: Slots) -> _Rows | None:
        """Keep the rows ``stays``, and run the model on the tokens they drew; None if there are none."""
        if not len(stays):
            return None
        before, vocabulary = rows.nodes, rows.nodes.logits_QV.shape[-1]
        # Rows that were equal and drew the same token are equal; sequences are ordered by those they continue.
        codes, node_R = np.unique(rows.node_R[stays] * vocabulary + drawn_R[stays], return_inverse=True)
        parent_Q, token_Q = np.divmod(codes, vocabulary)
        slot_Q = _place(before.slot_Q[parent_Q], slots)
        order = np.argsort(slot_Q)
        parent_Q, tokens = parent_Q[order], torch.from_numpy(token_Q[order])
        position_Q = before.position_Q[parent_Q]
        hidden = self._forward.hidden(tokens, slots.start_step(position_Q), slots)
        logits = self._forward.logits(hidden, self._packed.weight(self._forward.head, len(tokens)))
        seen = None if before.seen_QV is None else before.seen_QV[torch.from_numpy(parent_Q)]
        seen = None if seen is None else seen.scatter(1, tokens[:, None], True)
        nodes, node_R = _Nodes(slot_Q[order], position_Q + 1, logits, seen), slot_Q[node_R]
        by_node = np.argsort(node_R, kind="stable")
        stays = stays[by_node]
        return _Rows(rows.origin_R[stays], rows.t_R[stays] + 1, node_R[by_node], nodes)


def _place(parent_Q: np.ndarray, slots: Slots) -> np.ndarray:
    """Bring Q sequences to the first Q slots.

    Args:
        parent_Q: slot of the sequence that each of them continues, equal ones side by side. The first of these stays
            there, if it is among the first Q; the others are copied to slots that none of them continues.

    Returns:
        The slot of each.
    """
    num = len(parent_Q)
    stays_Q = np.diff(parent_Q, prepend=-1) != 0
    stays_Q &= parent_Q < num
    slot_Q = parent_Q.copy()
    slot_Q[~stays_Q] = np.setdiff1d(np.arange(num), parent_Q[stays_Q])
    if not stays_Q.all():
        slots.move(torch.from_numpy(parent_Q[~stays_Q]), torch.from_numpy(slot_Q[~stays_Q]))
    return slot_Q
