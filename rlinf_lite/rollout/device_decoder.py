"""Decoding on a GPU: all that is known of the rows stays there, and a CUDA graph advances them by a token each.

The host looks every few tokens which rows have finished, lets others take their places, and continues with the
smallest graph that holds those that are left. The same code runs without graphs, on a CPU too.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from rlinf_lite import numerics
from rlinf_lite.models.head import logprobs_of
from rlinf_lite.rollout import gumbel
from rlinf_lite.rollout.batches import rng_keys
from rlinf_lite.rollout.device_slots import DeviceSlots
from rlinf_lite.rollout.forward import Forward, NewRows, Waiting
from rlinf_lite.rollout.output import Sampled
from rlinf_lite.rollout.sampling import masked, penalize_repetition
from rlinf_lite.types import GenerationBatch, Sampling

_LEAST_ROWS = 16
"""Rows of the smallest graph; each other one has twice as many as the one before, the last one all slots."""
_STEPS = 16
"""Tokens per row between two looks at which rows have finished."""
_KEYS = 256
"""The cache's positions are a multiple of it."""


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What a batch needs of the memory that graphs work on."""

    slots: int
    """Rows at once: S."""
    keys: int
    """Positions of a row: P."""
    rows: int
    """Rows of the batch: N."""
    tokens: int
    """Tokens of a response: T."""

    def holds(self, other: _Sizes) -> bool:
        return all(mine >= its for mine, its in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True))

    def join(self, other: _Sizes) -> _Sizes:
        return _Sizes(*map(max, dataclasses.astuple(self), dataclasses.astuple(other)))


class _Rows:
    """The state of S rows, in an order that changes; `step` is what a graph replays. Only the first rows are live."""

    def __init__(self, sizes: _Sizes, forward: Forward, eos_ids: frozenset[int], with_logprobs: bool) -> None:
        self.sizes, self._forward, self._with_logprobs, device = sizes, forward, with_logprobs, forward.device

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        num, head = sizes.slots, forward.head.weight
        self.slot_S = torch.arange(num, device=device)
        self.origin_S, self.position_S, self.t_S = zeros(num), zeros(num), zeros(num, dtype=torch.int32)
        self.live_S, self.words_S2 = zeros(num, dtype=torch.bool), zeros(num, 2, dtype=torch.int32)
        self.logits_SV = zeros(num, len(head), dtype=head.dtype)
        self.seen_SV: Tensor | None = None
        self.slots = DeviceSlots(num, sizes.keys, device)
        # The last row takes what rows that are not live draw.
        shape = sizes.rows + 1, sizes.tokens
        self.tokens_NT, self.logprobs_NT = zeros(*shape, dtype=torch.int32), zeros(*shape, dtype=torch.float32)
        self.length_N, self.finished_N = zeros(shape[0]), zeros(shape[0], dtype=torch.bool)
        self.max_tokens, self.not_finite = zeros(dtype=torch.int32), zeros(1, dtype=torch.bool)
        self._eos = torch.tensor(sorted(eos_ids), device=device)
        self._temperatures: dict[float, Tensor] = {}

    def state(self) -> list[Tensor]:
        """Per row, in the order of the rows."""
        state = [self.slot_S, self.origin_S, self.position_S, self.t_S, self.live_S, self.words_S2, self.logits_SV]
        return state if self.seen_SV is None else [*state, self.seen_SV]

    def start_batch(self, sampling: Sampling) -> None:
        self.max_tokens.fill_(sampling.max_new_tokens)
        self.live_S.zero_()
        if sampling.repetition_penalty != 1.0 and self.seen_SV is None:
            self.seen_SV = torch.zeros_like(self.logits_SV, dtype=torch.bool)

    def fill(self, first: int, new: NewRows, words_R2: Tensor) -> None:
        """Begin new rows at the places from ``first`` on."""
        places, device = slice(first, first + len(new.origin_R)), self.live_S.device
        self.origin_S[places] = torch.from_numpy(new.origin_R).to(device)
        self.position_S[places] = torch.from_numpy(new.length_R).to(device)
        self.t_S[places] = 0
        self.live_S[places] = True
        self.words_S2[places] = words_R2
        self.logits_SV[places] = new.logits_RV
        if self.seen_SV is not None and new.seen_RV is not None:
            self.seen_SV[places] = new.seen_RV

    def reorder(self, order_S: np.ndarray) -> None:
        index = torch.from_numpy(order_S).to(self.live_S.device)
        for tensor in self.state():
            tensor.copy_(tensor.index_select(0, index))

    def step(self, num: int, sampling: Sampling) -> None:
        """Draw a token for each of the first ``num`` rows, keep those of live ones, and run the model on them."""
        slot, position, t, live, logits = (
            x[:num] for x in (self.slot_S, self.position_S, self.t_S, self.live_S, self.logits_SV)
        )
        drawn, score = self._draw(num, sampling)
        self.not_finite |= (live & ~score.isfinite()).any()
        row = torch.where(live, self.origin_S[:num], self.sizes.rows)
        place = row, t.long().clamp(max=self.sizes.tokens - 1)
        ended = (drawn[:, None] == self._eos).any(1)
        with numerics.distinct_places():  # but for the last row
            self.tokens_NT.index_put_(place, drawn.int())
            if self._with_logprobs:
                temperature = sampling.temperature if sampling.do_sample else 1.0
                self.logprobs_NT.index_put_(place, logprobs_of(logits, drawn, temperature))
            self.length_N.index_put_((row,), t.long() + 1)
            self.finished_N.index_put_((row,), ended)
            if self.seen_SV is not None:
                self.seen_SV[:num].scatter_(1, drawn[:, None], True)
        live &= ~(ended | (t + 1 >= self.max_tokens))
        self.slots.start_step(slot, position)
        logits.copy_(self._forward.logits(self._forward.hidden(drawn, position, self.slots)))
        position += live
        t += live

    def _draw(self, num: int, sampling: Sampling) -> tuple[Tensor, Tensor]:
        logits = self.logits_SV[:num]
        if sampling.repetition_penalty != 1.0 and self.seen_SV is not None:
            logits = penalize_repetition(logits, self.seen_SV[:num], sampling.repetition_penalty)
        if not sampling.do_sample:
            return logits.argmax(-1), logits.amax(-1)
        logits, words, t = masked(logits, sampling), self.words_S2[:num], self.t_S[:num]
        if not logits.is_cuda:
            return gumbel.draw_on_device(logits, sampling.temperature, words, t)
        from rlinf_lite.rollout import gumbel_kernel

        if sampling.temperature not in self._temperatures:
            self._temperatures[sampling.temperature] = logits.new_tensor([sampling.temperature], dtype=torch.float64)
        return gumbel_kernel.draw(logits, self._temperatures[sampling.temperature], words, t)


class DeviceDecoder:
    """Samples the rows of a batch, some tokens each at a time."""

    def __init__(self, forward: Forward, *, eos_ids: frozenset[int], with_logprobs: bool, max_rows: int) -> None:
        """
        Args:
            max_rows: rows that are decoded at once, at most.
        """
        self._forward, self._eos_ids, self._max_rows = forward, eos_ids, max_rows
        self._with_logprobs = with_logprobs
        self._rows: _Rows | None = None
        self._graphs: dict[tuple[int, Sampling], torch.cuda.CUDAGraph] = {}
        self._stream: torch.cuda.Stream | None = None
        if forward.device.type == "cuda":
            from rlinf_lite.rollout.few_rows import FewRows

            self._stream, self._few_rows = torch.cuda.Stream(), FewRows.of(forward.model)

    def decode(self, batch: GenerationBatch) -> Sampled:
        """Sample all rows of ``batch``.

        Raises:
            NotFinite: a row's largest logit is NaN or infinite: no token would mean anything.
        """
        keys = rng_keys(batch)
        rows, sampling = self._take_rows(batch, len(keys)), batch.sampling
        rows.start_batch(sampling)
        words_N2 = gumbel.key_words(keys).to(self._forward.device)
        waiting = Waiting(self._forward, batch, rows.slots)
        num_slots = rows.sizes.slots
        slot_S, live_S = np.array(rows.slot_S.tolist()), np.zeros(num_slots, dtype=np.bool_)
        t_S = np.zeros(num_slots, dtype=np.int64)
        while waiting.num_left or live_S.any():
            num_live = int(live_S.sum())
            enter = num_live == 0 or waiting.worth(self._max_rows - num_live, self._max_rows)
            enter &= waiting.num_left > 0
            last = int(np.flatnonzero(live_S).max(initial=-1)) + 1
            if last > num_live and (enter or _bucket(last, num_slots) > _bucket(num_live, num_slots)):
                order = np.argsort(~live_S, kind="stable")
                rows.reorder(order)
                slot_S, live_S, t_S, last = slot_S[order], live_S[order], t_S[order], num_live
            if enter:
                for new in waiting.enter(slot_S[last : self._max_rows]):
                    rows.fill(last, new, words_N2[torch.from_numpy(new.origin_R).to(words_N2.device)])
                    places = slice(last, last + len(new.origin_R))
                    live_S[places], t_S[places], last = True, 0, places.stop
            num, steps = _bucket(last, num_slots), min(_STEPS, sampling.max_new_tokens - int(t_S[live_S].min()))
            self._advance(rows, num, sampling, steps)
            *lives, not_finite = torch.cat([rows.live_S[:num], rows.not_finite]).tolist()
            if not_finite:
                raise gumbel.not_finite()
            live_S[:num], t_S[:num] = lives, t_S[:num] + steps
        self._rows = rows
        return self._fetch(rows, len(keys), sampling.max_new_tokens)

    def _take_rows(self, batch: GenerationBatch, num_rows: int) -> _Rows:
        """Memory of the last batch if it is large enough, and no error left it as it was."""
        longest = max(len(prompt.problem.prompt_ids) for prompt in batch.prompts) + batch.sampling.max_new_tokens
        needed = _Sizes(
            -(-min(num_rows, self._max_rows) // _LEAST_ROWS) * _LEAST_ROWS,
            -(-longest // _KEYS) * _KEYS,
            num_rows,
            batch.sampling.max_new_tokens,
        )
        rows, self._rows = self._rows, None
        if rows is None or not rows.sizes.holds(needed):
            if rows is not None:
                needed = needed.join(rows.sizes)
            self._graphs.clear()
            del rows
            rows = _Rows(needed, self._forward, self._eos_ids, self._with_logprobs)
        return rows

    def _advance(self, rows: _Rows, num: int, sampling: Sampling, steps: int) -> None:
        """Take ``steps`` steps with the first ``num`` rows."""
        if self._stream is None or _get_current_dispatch_mode() is not None:  # which would not see what a graph does
            for _ in range(steps):
                rows.step(num, sampling)
            return
        key = num, dataclasses.replace(sampling, max_new_tokens=0)
        if key not in self._graphs:
            self._graphs[key] = self._capture(rows, num, sampling, self._stream)
        for _ in range(steps):
            self._graphs[key].replay()

    def _capture(self, rows: _Rows, num: int, sampling: Sampling, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        self._few_rows.prepare(num)
        saved = [tensor.clone() for tensor in rows.state()]
        rows.live_S.zero_()  # so that nothing is kept of the step in which kernels are compiled and loaded
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            rows.step(num, sampling)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        # Other threads of the process may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            rows.step(num, sampling)
        for tensor, value in zip(rows.state(), saved, strict=True):
            tensor.copy_(value)
        return graph

    def _fetch(self, rows: _Rows, num_rows: int, max_tokens: int) -> Sampled:
        return Sampled(  # copies, on a CPU too
            rows.tokens_NT[:num_rows, :max_tokens].cpu().numpy().astype(np.int64),
            rows.logprobs_NT[:num_rows, :max_tokens].cpu().numpy().copy(),
            rows.length_N[:num_rows].cpu().numpy().copy(),
            rows.finished_N[:num_rows].cpu().numpy().copy(),
        )


def _bucket(num: int, num_slots: int) -> int:
    """Rows of the smallest graph that holds ``num``."""
    return min(max(_LEAST_ROWS, 1 << max(num - 1, 0).bit_length()), num_slots)
