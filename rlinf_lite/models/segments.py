"""Tokens of segments end to end, as the models take them: never fewer than a matrix product needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from rlinf_lite.models.forest import Forest
from rlinf_lite.models.head import MIN_ROWS
from rlinf_lite.types import Segments


@dataclass(frozen=True, slots=True)
class FlatTokens:
    """N >= MIN_ROWS tokens of a forest of segments, on one device."""

    ids_N: Tensor
    positions_N: Tensor
    layout: Forest

    @classmethod
    def of(
        cls,
        ids_N: Tensor,
        positions_N: Tensor,
        segments: Segments,
        device: torch.device | None = None,
        *,
        multiple: int = 1,
    ) -> Self:
        """Append what is missing as a segment of its own, which no other token sees.

        Args:
            multiple: N becomes a multiple of it.
        """
        wanted = -(-max(MIN_ROWS, len(ids_N)) // multiple) * multiple
        missing = wanted - len(ids_N)
        if missing:
            start, stop = len(ids_N), wanted
            segments = Segments(
                start_S=functional.pad(segments.start_S, (0, 1), value=start),
                stop_S=functional.pad(segments.stop_S, (0, 1), value=stop),
                parent_S=functional.pad(segments.parent_S, (0, 1), value=-1),
            )
            ids_N = functional.pad(ids_N, (0, missing))
            positions_N = torch.cat([positions_N, torch.arange(missing)])
        return cls(ids_N.to(device), positions_N.to(device), Forest(segments, device))

    @classmethod
    def none(cls, device: torch.device | None = None) -> Self:
        """Tokens that nobody asked for: for a forward pass of which only the collectives matter."""
        empty = torch.zeros(0, dtype=torch.int64)
        return cls.of(empty, empty, Segments(start_S=empty, stop_S=empty, parent_S=empty), device)
