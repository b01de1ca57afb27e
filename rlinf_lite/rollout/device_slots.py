"""The cache of keys and values on a GPU, with places that stay where they are, so that a CUDA graph can be replayed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rlinf_lite import numerics
from rlinf_lite.models import flash
from rlinf_lite.models.attention import Mask, Rule, attend
from rlinf_lite.models.head import MIN_ROWS
from rlinf_lite.rollout.slots import KeysValues


class DeviceSlots:
    """A `Layout` for one new token per row, which keeps keys and values [S, P, K, D] per layer.

    A row's slot is any of the S; a token's place in it is its position. Rows change their order without being copied.
    """

    def __init__(self, num_slots: int, num_keys: int, device: torch.device) -> None:
        """
        Args:
            num_slots: S.
            num_keys: P, the longest prompt and its response.
        """
        self.num_slots, self.num_keys, self.device = num_slots, num_keys, device
        self.calls, self.longest = 0, num_keys
        self._cache = dict[int, tuple[Tensor, Tensor]]()
        self._masks: dict[int | None, Mask] = {}

    def start_step(self, slot_R: Tensor, position_R: Tensor) -> None:
        """Take slot and position of the new tokens."""
        self._slot_R, self._position_R = slot_R, position_R
        self._first_key_R = functional.pad((slot_R * self.num_keys).int(), (0, 1))
        self._keys_R = (position_R + 1).int()
        self._masks = {}

    def attend(self, layer: int, q_HRD: Tensor, k_KRD: Tensor, v_KRE: Tensor, rule: Rule) -> Tensor:
        """As `Layout.attend`; keeps the new keys and values."""
        cache = self._layer(layer, (k_KRD, v_KRE))
        with numerics.distinct_places():
            for kept, new in zip(cache, (k_KRD, v_KRE), strict=True):
                kept.index_put_((self._slot_R, self._position_R), new.transpose(0, 1).to(kept.dtype))
        if flash.fits(q_HRD, v_KRE, rule):
            return flash.attend_slots(q_HRD, *cache, self._first_key_R, self._keys_R, rule)
        return self._attend_densely(q_HRD, cache, len(k_KRD), rule)

    def _attend_densely(self, q_HRD: Tensor, cache: KeysValues, kv_heads: int, rule: Rule) -> Tensor:
        """What `flash` does not take: float32, soft-caps, other heads."""
        (heads, rows, _), group = q_HRD.shape, len(q_HRD) // kv_heads
        keys, values = (kept.index_select(0, self._slot_R).transpose(1, 2) for kept in cache)
        q = q_HRD.to(keys.dtype).mul(rule.scaling).transpose(0, 1).unflatten(1, (kv_heads, -1))
        q = functional.pad(q, (0, 0, 0, MIN_ROWS - group)) if group < MIN_ROWS else q
        if rule.window not in self._masks:
            positions = self._position_R[:, None, None, None]
            self._masks[rule.window] = Mask.of(positions, self.num_keys, rule.window, q.dtype)
        out = attend(q, keys, values, self._masks[rule.window], rule.softcap)[0][:, :, :group]
        return out.reshape(rows, heads, -1).to(q_HRD.dtype)

    def _layer(self, layer: int, like: KeysValues) -> KeysValues:
        if layer not in self._cache:
            keys, values = (self._zeros(new) for new in like)
            self._cache[layer] = keys, values
        return self._cache[layer]

    def _zeros(self, like_KRD: Tensor) -> Tensor:
        is_16_bit = like_KRD.is_cuda and like_KRD.element_size() == 2
        dtype = like_KRD.dtype if is_16_bit else torch.promote_types(like_KRD.dtype, torch.float32)
        shape = self.num_slots, self.num_keys, len(like_KRD), like_KRD.shape[-1]
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def store(self, layer: int, slots: Sequence[int] | np.ndarray, keys_values: KeysValues) -> None:
        """As `Cache.store`."""
        like = keys_values[0].transpose(0, 1)[:, 0], keys_values[1].transpose(0, 1)[:, 0]
        length, places = keys_values[0].shape[2], torch.from_numpy(np.asarray(slots)).to(self.device)
        for kept, new in zip(self._layer(layer, like), keys_values, strict=True):
            kept[:, :length].index_copy_(0, places, new.transpose(1, 2).to(kept.dtype))
