"""The engine's layouts: a cache of keys and values by row and position, for decoding and for computing prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rlinf_lite.models.attention import PAD, Mask, Rule, attend
from rlinf_lite.models.head import MIN_ROWS
from rlinf_lite.models.segments import FlatTokens
from rlinf_lite.types import Segments

KeysValues = tuple[Tensor, Tensor]
_MORE = 512
"""Positions that a cache grows by, at most, when it is full."""
_HEAD = 8
"""MKL's products were found not to depend on the number of rows if the size of a head is a multiple of this."""


class Cache(Protocol):
    """Keeps keys and values by slot and position."""

    device: torch.device

    def store(self, layer: int, slots: Sequence[int] | np.ndarray, keys_values: KeysValues) -> None:
        """Set the first positions of ``slots``: [R, K, T, D] and [R, K, T, E]."""


class Slots:
    """A `Layout` on a CPU for the new tokens of R rows, which keeps keys and values [R, K, P, D] per layer.

    A token's place is its position. What a row does not see adds exact zeros, as long as it is finite.
    """

    device = torch.device("cpu")

    def __init__(self, num_rows: int) -> None:
        """
        Args:
            num_rows: rows that are decoded at once, at most.
        """
        self.num_rows, self.calls, self.longest = num_rows, 0, 0
        self._cache = dict[int, list[Tensor]]()
        self._num_keys = 0
        self._masks: dict[int | None, Mask] = {}
        self._places_of: dict[tuple[int, int], Tensor] = {}
        self._scaled: dict[tuple[int, int, int, torch.dtype], Tensor] = {}
        """Memory of this step for queries, times the scaling; what is added to reach `MIN_ROWS` stays 0."""

    @property
    def may_draft(self) -> bool:
        """Whether several tokens per row are bitwise identical to one at a time. With heads of size 10 they do not."""
        return all(kept.shape[-1] % _HEAD == 0 for cache in self._cache.values() for kept in cache)

    def start_batch(self) -> None:
        """Forget the rows, but keep their memory: it is finite, if the weights were."""
        self.longest = self._num_keys = 0

    def start_step(self, positions_R: np.ndarray, counts_R: np.ndarray) -> Tensor:
        """Take the positions of N new tokens, by row from the first row on; returns them.

        Args:
            positions_R: of the first new token of each row.
            counts_R: how many each row has, 1 or more.
        """
        self.longest = int((positions_R + counts_R).max())
        self._num_keys = -(-self.longest // PAD) * PAD
        self._masks, self._places_of, self._scaled = {}, {}, {}
        self._token_RL = self._place_N = None
        rows, most = np.arange(len(counts_R)), int(counts_R.max())
        if most == 1:
            self._row_N, self._position_N = torch.from_numpy(rows), torch.from_numpy(positions_R)
            self._position_RL = self._position_N[:, None]
            return self._position_N
        row_N, start_R = rows.repeat(counts_R), counts_R.cumsum() - counts_R
        ahead_N = np.arange(len(row_N)) - start_R[row_N]
        position_N = positions_R[row_N] + ahead_N
        token_RL = start_R[:, None] + np.minimum(np.arange(most), counts_R[:, None] - 1)
        self._row_N, self._position_N = torch.from_numpy(row_N), torch.from_numpy(position_N)
        self._position_RL = torch.from_numpy(position_N[token_RL])
        if len(row_N) < token_RL.size:
            self._token_RL, self._place_N = torch.from_numpy(token_RL), torch.from_numpy(row_N * most + ahead_N)
        return self._position_N

    def attend(self, layer: int, q_HND: Tensor, k_KND: Tensor, v_KNE: Tensor, rule: Rule) -> Tensor:
        """As `Layout.attend`; keeps the new keys and values."""
        cache = self._layer(layer, (k_KND, v_KNE), self._num_keys)
        for kept, new in zip(cache, (k_KND, v_KNE), strict=True):
            places, new_NKD = self._places(len(new), kept.shape[2]), new.transpose(0, 1)
            kept.view(-1, kept.shape[-1]).index_copy_(0, places, new_NKD.reshape(-1, kept.shape[-1]).to(kept.dtype))
        (heads, _, dim), kv_heads, (rows, most) = q_HND.shape, len(k_KND), self._position_RL.shape
        keys, values = (kept[:rows, :, : self._num_keys] for kept in cache)
        q_NHD = q_HND.transpose(0, 1)
        if self._token_RL is not None:
            q_NHD = q_NHD[self._token_RL.flatten()]
        group = heads // kv_heads
        kind = kv_heads, group, dim, keys.dtype
        q_RKLGD = self._scaled.get(kind)
        if q_RKLGD is None:
            shape = rows, kv_heads, most, max(group, -(-MIN_ROWS // most)), dim
            q_RKLGD = self._scaled[kind] = torch.zeros(shape, dtype=keys.dtype)
        q = q_NHD.view(rows, most, kv_heads, group, dim).transpose(1, 2)
        torch.mul(q if q.dtype is keys.dtype else q.to(keys.dtype), rule.scaling, out=q_RKLGD[:, :, :, :group])
        out = attend(q_RKLGD.flatten(2, 3), keys, values, self._mask(rule.window, keys.dtype), rule.softcap)[0]
        if most > 1:
            out = out.unflatten(2, (most, -1)).transpose(1, 2).flatten(0, 1)
        out_NHE = out[:, :, :group].reshape(rows * most, heads, -1)
        return (out_NHE if self._place_N is None else out_NHE[self._place_N]).to(q_HND.dtype)

    def _places(self, num_heads: int, room: int) -> Tensor:
        """Where the new tokens are in a cache [R * K * P] of ``room`` positions: int64 [N * K]."""
        places = self._places_of.get((num_heads, room))
        if places is None:
            head_NK = self._row_N[:, None] * num_heads + torch.arange(num_heads)
            places = self._places_of[num_heads, room] = (head_NK * room + self._position_N[:, None]).flatten()
        return places

    def _mask(self, window: int | None, dtype: torch.dtype) -> Mask:
        if window not in self._masks:
            self._masks[window] = Mask.of(self._position_RL[:, None, :, None], self._num_keys, window, dtype)
        return self._masks[window]

    def _layer(self, layer: int, like: KeysValues, num_keys: int) -> list[Tensor]:
        """The cache of a layer, with room for ``num_keys`` positions."""
        cache = self._cache.get(layer)
        if cache is None:
            dtype = torch.promote_types(like[0].dtype, torch.float32)  # attention is: 16-bit values are widened once
            shapes = [(self.num_rows, len(new), num_keys, new.shape[-1]) for new in like]
            cache = self._cache[layer] = [torch.zeros(shape, dtype=dtype) for shape in shapes]
        elif (room := cache[0].shape[2]) < num_keys:
            added = -(-max(num_keys - room, min(room, _MORE)) // PAD) * PAD
            cache[:] = [functional.pad(kept, (0, 0, 0, added)) for kept in cache]
        return cache

    def store(self, layer: int, slots: Sequence[int] | np.ndarray, keys_values: KeysValues) -> None:
        """As `Cache.store`, for slots side by side."""
        length, rows = keys_values[0].shape[2], slice(slots[0], slots[-1] + 1)
        like = keys_values[0].transpose(0, 1)[:, 0], keys_values[1].transpose(0, 1)[:, 0]
        self._num_keys = max(self._num_keys, -(-length // PAD) * PAD)
        cache = self._layer(layer, like, self._num_keys)
        for kept, new in zip(cache, keys_values, strict=True):
            kept[rows, :, :length] = new.to(kept.dtype)

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole rows to where others have left."""
        for cache in self._cache.values():
            for kept in cache:
                kept[targets, :, : self._num_keys] = kept[sources, :, : self._num_keys]


class Prefill:
    """A `Layout` for prompts, once each, that also leaves their keys and values in the slots of their rows."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_R: np.ndarray,
        cache: Cache,
        slots: Sequence[int] | np.ndarray,
    ) -> None:
        """
        Args:
            prompts: token ids.
            prompt_R: index in ``prompts`` for each of the R ``slots``.
        """
        self._cache, self._slots = cache, slots
        stops = np.cumsum([len(prompt) for prompt in prompts])
        starts = stops - [len(prompt) for prompt in prompts]
        ids, device = np.concatenate([np.asarray(prompt, dtype=np.int64) for prompt in prompts]), cache.device
        segments = Segments(
            start_S=torch.from_numpy(starts), stop_S=torch.from_numpy(stops), parent_S=torch.full((len(stops),), -1)
        )
        positions = np.arange(len(ids)) - np.repeat(starts, stops - starts)
        tokens = FlatTokens.of(torch.from_numpy(ids), torch.from_numpy(positions), segments, device)
        self.ids_N, self.positions_N, self._forest = tokens.ids_N, tokens.positions_N, tokens.layout
        self.calls, self.longest = 0, self._forest.longest
        self.last_P = torch.from_numpy(stops - 1).to(device)
        """Index of each prompt's last token."""
        # Beyond a prompt's end its last token is repeated: a place is written again before it is seen.
        token_RT = np.minimum(starts[prompt_R, None] + np.arange(self.longest), stops[prompt_R, None] - 1)
        self._token_RT = torch.from_numpy(token_RT).to(device)
        self._of_last = slice(int(starts[-1]), int(stops[-1]))
        self.held: dict[int, KeysValues] = {}
        """Per layer keys and values [1, K, T, D] of the last prompt, for rows of its group that join later."""

    def attend(self, layer: int, q_HND: Tensor, k_KND: Tensor, v_KNE: Tensor, rule: Rule) -> Tensor:
        """As `Layout.attend`; keeps the prompts' keys and values."""
        flat, shape = self._token_RT.flatten(), self._token_RT.shape
        keys, values = (new.index_select(1, flat).unflatten(1, shape).transpose(0, 1) for new in (k_KND, v_KNE))
        self._cache.store(layer, self._slots, (keys, values))
        self.held[layer] = k_KND[None, :, self._of_last].clone(), v_KNE[None, :, self._of_last].clone()
        return self._forest.attend(layer, q_HND, k_KND, v_KNE, rule)
