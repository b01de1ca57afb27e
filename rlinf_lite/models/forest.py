"""`Forest`: segments of tokens end to end, where a shared prompt is computed once, below it its responses.

The layout of training and of prompts. Segments are split into pieces, and pieces of about the same size are computed as
one batch: no loop over segments. See models/attention.py for what keeps the bits.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlinf_lite.models import flash
from rlinf_lite.models.attention import BLOCK, PAD, Mask, Rule, attend, attend_backward
from rlinf_lite.models.head import MIN_ROWS
from rlinf_lite.types import Segments

_PIECE = 128
"""Queries of one segment computed together. A longer segment is split, so that its early queries skip late keys."""
_STEP = 16
"""Pieces are batched with others whose number of queries is equal up to this."""
_MAX_SCORES = 1 << 20
"""Scores per head in one batch: 4 MiB."""
_Piece = tuple[np.ndarray, int, int]
"""Path of its segment, position of the first query, number of queries."""


class Bucket:
    """S pieces of segments of about the same size. Index N in queries and keys is padding: a row of zeros."""

    def __init__(self, query_SL: Tensor, key_SP: Tensor, position_SL: Tensor) -> None:
        self.query_SL, self.key_SP, self._position_SL = query_SL, key_SP, position_SL
        self._masks: dict[int | None, Mask] = {}

    def mask(self, window: int | None, dtype: torch.dtype) -> Mask:
        """[S, L, 1, P]; made once for all layers."""
        if window not in self._masks:
            self._masks[window] = Mask.of(self._position_SL[..., None], self.key_SP.shape[1], window, dtype)
        return self._masks[window]


class Pieces:
    """All segments as buckets of pieces."""

    def __init__(
        self, paths: Sequence[np.ndarray], depths: Sequence[int], num_tokens: int, device: torch.device | None
    ) -> None:
        """
        Args:
            paths, depths: as in `Forest`.
        """
        self.num_tokens, self._device = num_tokens, device
        self.buckets: list[Bucket] = []
        members_of: dict[tuple[int, int], list[_Piece]] = defaultdict(list)
        for path, depth in zip(paths, depths, strict=True):
            for first in range(depth, len(path), _PIECE):
                size = min(_PIECE, len(path) - first)
                members_of[-(-(first + size) // BLOCK), -(-size // _STEP)].append((path, first, size))
        place_N, done = np.empty(num_tokens, dtype=np.int64), 0
        for _, members in sorted(members_of.items(), key=lambda item: item[0]):
            num_queries = max(MIN_ROWS, max(size for _, _, size in members))
            num_keys = -(-max(first + size for _, first, size in members) // PAD) * PAD
            most = max(1, _MAX_SCORES // (num_queries * num_keys))
            for i in range(0, len(members), most):
                query = self._add_bucket(members[i : i + most], num_queries, num_keys)
                real = query < num_tokens
                place_N[query[real]] = done + np.flatnonzero(real)
                done += query.size
        self.place_N = self._tensor(place_N)
        """Where a token's output stands when those of all buckets are laid end to end."""

    def _add_bucket(self, members: Sequence[_Piece], num_queries: int, num_keys: int) -> np.ndarray:
        """Add pieces; returns the tokens of their queries [S, L]."""
        query = np.full((len(members), num_queries), self.num_tokens)
        position = np.zeros_like(query)
        key = np.full((len(members), num_keys), self.num_tokens)
        for i, (path, first, size) in enumerate(members):
            key[i, : first + size] = path[: first + size]
            query[i, :size] = path[first : first + size]
            position[i, :size] = np.arange(first, first + size)
        self.buckets.append(Bucket(self._tensor(query), self._tensor(key), self._tensor(position)))
        return query

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device)


class Forest:
    """A `Layout`: a token sees its segment's ancestors, and what is before it in its own segment."""

    def __init__(self, segments: Segments, device: torch.device | None = None) -> None:
        """
        Args:
            segments: their tokens are N in all, end to end.
            device: of the model.
        """
        starts, stops, parents = (getattr(segments, name).tolist() for name in ("start_S", "stop_S", "parent_S"))
        self.num_tokens, self.calls, self._device = stops[-1], 0, device
        self.paths: list[np.ndarray] = []
        """Per segment the indices of its ancestors' tokens and its own: its keys, by position."""
        self.depths: list[int] = []
        """Per segment the position of its first token."""
        for start, stop, parent in zip(starts, stops, parents, strict=True):
            own = np.arange(start, stop)
            self.paths.append(own if parent < 0 else np.concatenate([self.paths[parent], own]))
            self.depths.append(len(self.paths[-1]) - len(own))
        self.longest = max(len(path) for path in self.paths)
        self.starts = starts

    @functools.cached_property
    def _packed(self) -> flash.Packed:
        return flash.Packed(self.paths, self.depths, self._device)

    @functools.cached_property
    def pieces(self) -> Pieces:
        """For the attention of `models.attention`."""
        return Pieces(self.paths, self.depths, self.num_tokens, self._device)

    def attend(self, layer: int, q_HND: Tensor, k_KND: Tensor, v_KNE: Tensor, rule: Rule) -> Tensor:
        """As `Layout.attend`."""
        if flash.fits(q_HND, v_KNE, rule):
            return self._packed.attend(q_HND, k_KND, v_KNE, rule)
        out_NHE: Tensor = _ForestAttention.apply(q_HND, k_KND, v_KNE, self.pieces, rule)
        return out_NHE


class _ForestAttention(torch.autograd.Function):
    """Keeps q, k, v, the output and the log-sum-exp; no scores."""

    @staticmethod
    def forward(ctx: Any, q_HND: Tensor, k_KND: Tensor, v_KNE: Tensor, pieces: Pieces, rule: Rule) -> Tensor:
        tokens = _by_key_head(q_HND, len(k_KND)).mul_(rule.scaling), _by_key_head(k_KND), _by_key_head(v_KNE)
        found = [
            attend(*_gather(bucket, *tokens), bucket.mask(rule.window, tokens[0].dtype), rule.softcap)
            for bucket in pieces.buckets
        ]
        outs, lses = [out for out, _, _ in found], [top + total.log() for _, top, total in found]
        del found
        shape = len(q_HND), pieces.num_tokens, v_KNE.shape[-1]
        # Contiguous, or the next layer would copy it and keep the copy.
        out_NHE = _ungather(pieces, outs, shape).transpose(0, 1).to(q_HND.dtype).contiguous()
        if out_NHE.dtype == outs[0].dtype:  # not rounded: the backward pass needs no other copy
            outs = []
        ctx.save_for_backward(q_HND, k_KND, v_KNE, out_NHE if not outs else None, *lses, *outs)
        ctx.pieces, ctx.rule = pieces, rule
        return out_NHE

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (q_HND, k_KND, v_KNE, out_NHE, *saved), pieces, rule = ctx.saved_tensors, ctx.pieces, ctx.rule
        num = len(k_KND)
        tokens = _by_key_head(q_HND, num).mul_(rule.scaling), _by_key_head(k_KND), _by_key_head(v_KNE)
        grad = _by_key_head(grad_outputs[0].transpose(0, 1), num)
        whole = None if out_NHE is None else _by_key_head(out_NHE.transpose(0, 1), num)
        lses, outs = saved[: len(pieces.buckets)], saved[len(pieces.buckets) :]
        dqs, dk, dv = [], torch.zeros_like(tokens[1]), torch.zeros_like(tokens[2])
        for index, (bucket, lse) in enumerate(zip(pieces.buckets, lses, strict=True)):
            q, k, v = _gather(bucket, *tokens)
            above = _of_queries(bucket, grad, lse)
            out = outs[index] if whole is None else _of_queries(bucket, whole, lse)
            mask = bucket.mask(rule.window, q.dtype)
            dq, *others = attend_backward(above, q, k, v, mask, rule.softcap, out, lse)
            dqs.append(dq)
            for total, part in zip((dk, dv), others, strict=True):  # a prompt's keys collect from all its responses
                for head in range(num):
                    total[head].index_add_(0, bucket.key_SP.flatten(), part[head].flatten(0, 1))
        dq = _ungather(pieces, dqs, q_HND.shape).mul_(rule.scaling)
        return dq.to(q_HND.dtype), dk[:, :-1].to(k_KND.dtype), dv[:, :-1].to(v_KNE.dtype), None, None


def _by_key_head(x_HND: Tensor, kv_heads: int | None = None) -> Tensor:
    """[K, N + 1, G * D] in float32 (float64 if ``x_HND`` is): the last row, which padding points to, is zero."""
    (heads, num, dim), kv_heads = x_HND.shape, kv_heads or len(x_HND)
    dtype = torch.promote_types(x_HND.dtype, torch.float32)
    rows = x_HND.new_zeros(kv_heads, num + 1, heads // kv_heads * dim, dtype=dtype)
    rows.view(kv_heads, num + 1, -1, dim)[:, :-1] = x_HND.unflatten(0, (kv_heads, -1)).transpose(1, 2)
    return rows


def _gather(bucket: Bucket, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (num, num_keys), (heads, _, dim) = bucket.key_SP.shape, k.shape
    queries = q.index_select(1, bucket.query_SL.flatten()).view(heads, num, -1, dim)
    keys, values = (x.index_select(1, bucket.key_SP.flatten()).view(heads, num, num_keys, -1) for x in (k, v))
    return queries, keys, values


def _of_queries(bucket: Bucket, rows: Tensor, lse: Tensor) -> Tensor:
    """Those of all tokens [K, N + 1, G * E] that belong to the queries of ``lse`` [K, S, L * G]: [K, S, L * G, E]."""
    found = rows.index_select(1, bucket.query_SL.flatten())
    return found.view(*lse.shape, -1)


def _ungather(pieces: Pieces, outs: list[Tensor], shape_HNE: Sequence[int]) -> Tensor:
    """Outputs of all buckets, back in the order of the tokens: [H, N, E]."""
    heads, num, dim = shape_HNE
    group = heads // len(outs[0])
    rows = torch.cat([out.view(len(out), -1, group * dim) for out in outs], 1).index_select(1, pieces.place_N)
    return rows.view(-1, num, group, dim).transpose(1, 2).flatten(0, 1)
