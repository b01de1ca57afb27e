"""Decoding on a CPU: a loop that keeps what it knows of the rows in numpy arrays."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlinf_lite.errors import NotFinite
from rlinf_lite.models import attention
from rlinf_lite.models.head import logprobs_of
from rlinf_lite.rollout.batches import rng_keys
from rlinf_lite.rollout.drafts import MAX_ROWS, Drafts
from rlinf_lite.rollout.forward import Forward, NewRows, Waiting
from rlinf_lite.rollout.output import Sampled
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
    count_Q: np.ndarray
    """Tokens whose logits are there: the next one's, and those after each of its drafts."""
    draft_L: np.ndarray
    """int64: the token with which the sequence continues if it is drawn from these logits; -1 from the last ones."""
    logits_LV: Tensor
    """By sequence, the next token's first."""
    seen_QV: Tensor | None
    """bool: tokens of prompt and response so far; None without a repetition penalty."""

    def join(self, other: _Nodes) -> _Nodes:
        """These sequences and, behind them, others."""
        return _Nodes(
            np.concatenate([self.slot_Q, other.slot_Q]),
            np.concatenate([self.position_Q, other.position_Q]),
            np.concatenate([self.count_Q, other.count_Q]),
            np.concatenate([self.draft_L, other.draft_L]),
            torch.cat([self.logits_LV, other.logits_LV]),
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
        ones = np.ones_like(first_Q)
        nodes = _Nodes(slots[first_Q], new.length_R[first_Q], ones, -ones, new.logits_RV[index], seen)
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
    """Samples the rows of a batch. Rows with the same sequence so far are computed once; few rows get drafts."""

    max_drafted = MAX_ROWS
    """Most sequences that get drafts; if there are more, none of them does."""

    def __init__(self, forward: Forward, *, eos_ids: frozenset[int], with_logprobs: bool, max_rows: int) -> None:
        """
        Args:
            max_rows: rows that are decoded at once, at most.
        """
        self._forward, self._max_rows, self._with_logprobs = forward, max_rows, with_logprobs
        self._eos = np.array(sorted(eos_ids), dtype=np.int64)
        self._longest = attention.longest_sequence(forward.model.config.get_text_config()) or sys.maxsize
        """No draft makes a sequence longer: the model may refuse it, although the response would have ended before."""
        self._slots: Slots | None = None
        """Of the last batch, for the next one."""

    def decode(self, batch: GenerationBatch) -> Sampled:
        """Sample all rows of ``batch``. Raises NotFinite as `sampling.draw`."""
        _ = self._forward.layers  # before there are copies of the weights, which the trial would double
        with self._forward.packed:
            if self.max_drafted:
                with suppress(NotFinite):
                    return self._decode(batch, self.max_drafted)
            # Without drafts, or again without them: a wrong one may be at fault. The row's own token does not see its
            # values, which count with a weight of 0, but 0 times NaN is NaN.
            return self._decode(batch, 0)

    def _decode(self, batch: GenerationBatch, max_drafted: int) -> Sampled:
        sampling, keys = batch.sampling, rng_keys(batch)
        out = Sampled.empty(len(keys), sampling.max_new_tokens)
        slots = self._take_slots(len(keys))
        waiting = Waiting(self._forward, batch, slots)
        rows: _Rows | None = None
        drafts: Drafts | None = None
        while rows is not None or waiting.num_left:
            rows = self._admit(rows, waiting, batch.group_size)
            drawn_R = self._draw(rows, batch, keys, out, drafts)
            ended_R = np.isin(drawn_R, self._eos)
            leaves_R = ended_R | (rows.t_R + 1 == sampling.max_new_tokens)
            out.length_N[rows.origin_R[leaves_R]] = rows.t_R[leaves_R] + 1
            out.finished_N[rows.origin_R[ended_R]] = True
            # More rows may come, and then what was learned of these would be forgotten too often.
            most = max_drafted if waiting.num_left == 0 or self._max_rows <= max_drafted else 0
            if len(rows.nodes.slot_Q) > most or rows.nodes.seen_QV is not None or not slots.may_draft:
                drafts = None
            elif drafts is None:
                drafts = Drafts(batch, out, frozenset(self._eos.tolist()), self._longest)
            rows = self._grow(rows, drawn_R, np.flatnonzero(~leaves_R), slots, drafts)
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

    def _draw(
        self, rows: _Rows, batch: GenerationBatch, keys: np.ndarray, out: Sampled, drafts: Drafts | None
    ) -> np.ndarray:
        """Sample a token per row, and as many more as its drafts come true; note them with their log-probs.

        Returns:
            The last token of each row, whose index ``rows.t_R`` then is.
        """
        nodes, node_R = rows.nodes, rows.node_R
        if len(nodes.draft_L) == len(nodes.slot_Q):  # there are none
            drawn_R, logprob_R = self._sample(nodes, node_R, rows.origin_R, rows.t_R, batch, keys)
            out.tokens_NT[rows.origin_R, rows.t_R] = drawn_R
            out.logprobs_NT[rows.origin_R, rows.t_R] = logprob_R
            if drafts is not None:
                for row, token in zip(rows.origin_R.tolist(), drawn_R.tolist(), strict=True):
                    drafts.took(row, [token])
            return drawn_R
        count_R = nodes.count_Q[node_R]
        first_R, row_L = count_R.cumsum() - count_R, np.arange(len(count_R)).repeat(count_R)
        ahead_L = np.arange(len(row_L)) - first_R[row_L]
        place_L = (nodes.count_Q.cumsum() - nodes.count_Q)[node_R][row_L] + ahead_L
        origin_L, t_L = rows.origin_R[row_L], rows.t_R[row_L] + ahead_L
        drawn_L, logprob_L = self._sample(nodes, place_L, origin_L, t_L, batch, keys)
        wrong_L = drawn_L != nodes.draft_L[place_L]
        misses_L = wrong_L.cumsum() - wrong_L  # before each token, of all rows
        kept_L = misses_L == misses_L[first_R][row_L]
        out.tokens_NT[origin_L[kept_L], t_L[kept_L]] = drawn_L[kept_L]
        out.logprobs_NT[origin_L[kept_L], t_L[kept_L]] = logprob_L[kept_L]
        more_R = np.add.reduceat(kept_L, first_R, dtype=np.int64) - 1
        if drafts is not None:
            for row, first, more in zip(rows.origin_R.tolist(), first_R.tolist(), more_R.tolist(), strict=True):
                drafts.took(row, drawn_L[first : first + more + 1].tolist())
        rows.t_R = rows.t_R + more_R
        nodes.position_Q[node_R] += more_R  # of rows that share a sequence, which has no drafts, it is 0
        return drawn_L[first_R + more_R]

    def _sample(
        self,
        nodes: _Nodes,
        place_L: np.ndarray,
        origin_L: np.ndarray,
        t_L: np.ndarray,
        batch: GenerationBatch,
        keys: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sample a token from the logits at each place; return the tokens and their log-probs (0 without log-probs)."""
        logits, sampling = nodes.logits_LV, batch.sampling
        drawn_L, logprob_L = np.empty_like(t_L), np.zeros(len(t_L), dtype=np.float32)
        if nodes.seen_QV is not None:
            logits = penalize_repetition(logits, nodes.seen_QV, sampling.repetition_penalty)
        are_equal = len(logits) < len(place_L)  # some rows; otherwise each has the logits in its place
        at_a_time = max(1, _MAX_COPIED // logits.shape[-1]) if are_equal else len(drawn_L)
        for first in range(0, len(drawn_L), at_a_time):
            part = slice(first, first + at_a_time)
            place = torch.from_numpy(place_L[part]) if are_equal else part
            drawn = draw(logits[place], sampling, keys[origin_L[part]], t_L[part])
            drawn_L[part] = drawn.numpy()
            if self._with_logprobs:
                temperature = sampling.temperature if sampling.do_sample else 1.0
                logprob_L[part] = logprobs_of(nodes.logits_LV[place], drawn, temperature).numpy()
        return drawn_L, logprob_L

    def _grow(
        self, rows: _Rows, drawn_R: np.ndarray, stays: np.ndarray, slots: Slots, drafts: Drafts | None
    ) -> _Rows | None:
        """Keep the rows ``stays``, and run the model on the tokens they drew; None if there are none."""
        if not len(stays):
            return None
        before, vocabulary = rows.nodes, rows.nodes.logits_LV.shape[-1]
        # Rows that were equal and drew the same token are equal; sequences are ordered by those they continue.
        codes, node_R = np.unique(rows.node_R[stays] * vocabulary + drawn_R[stays], return_inverse=True)
        parent_Q, token_Q = np.divmod(codes, vocabulary)
        slot_Q = _place(before.slot_Q[parent_Q], slots)
        order = np.argsort(slot_Q)
        parent_Q, token_Q, node_R = parent_Q[order], token_Q[order], slot_Q[node_R]
        by_node = np.argsort(node_R, kind="stable")
        stays, node_R = stays[by_node], node_R[by_node]
        kept = _Rows(rows.origin_R[stays], rows.t_R[stays] + 1, node_R, before)
        position_Q, count_Q, token_L = before.position_Q[parent_Q], np.ones_like(parent_Q), token_Q
        draft_L = -count_Q
        if drafts is not None:
            guesses = drafts.choose(*_alone(kept, len(token_Q)))
            count_Q += [len(guess) for guess in guesses]
            texts = zip(token_Q.tolist(), guesses, strict=True)
            token_L = np.array([token for text in texts for token in (text[0], *text[1])])
            draft_L = np.append(token_L[1:], -1)
            draft_L[count_Q.cumsum() - 1] = -1
        hidden = self._forward.hidden(torch.from_numpy(token_L), slots.start_step(position_Q, count_Q), slots)
        logits = self._forward.logits(hidden, self._forward.packed.weight(self._forward.head, len(token_L)))
        seen = None if before.seen_QV is None else before.seen_QV[torch.from_numpy(parent_Q)]
        seen = None if seen is None else seen.scatter(1, torch.from_numpy(token_Q)[:, None], True)
        kept.nodes = _Nodes(slot_Q[order], position_Q + 1, count_Q, draft_L, logits, seen)
        return kept


def _alone(rows: _Rows, num_nodes: int) -> tuple[list[int | None], list[int]]:
    """The row of each sequence, None if it has several, and how many tokens this row has drawn."""
    first_Q = np.searchsorted(rows.node_R, np.arange(num_nodes))
    is_alone_Q = np.bincount(rows.node_R, minlength=num_nodes) == 1
    found = zip(rows.origin_R[first_Q].tolist(), is_alone_Q.tolist(), strict=True)
    return [row if alone else None for row, alone in found], rows.t_R[first_Q].tolist()


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
