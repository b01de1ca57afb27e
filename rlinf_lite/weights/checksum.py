"""A checksum per weight, which pieces from any number of ranks add up to.

A row's sum is that of its 32-bit words, each times an odd number that depends on the column, modulo 2^32. A weight's
checksum is the sum of its rows' sums, each times an odd number that depends on the row, modulo 2^64. So one changed
element is always noticed, rows and columns that changed places almost always, and nothing depends on how rows are
divided over pieces.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from rlinf_lite.errors import WeightsDiffer
from rlinf_lite.weights.pieces import WeightPiece

Checksums = dict[str, int]
"""By the weight's name, 0 to 2^64 - 1."""

_MODULUS = 1 << 64
_GOLDEN, _MIX_1, _MIX_2 = (number - _MODULUS for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_WORDS_AT_ONCE = 1 << 19
"""Words whose products exist at a time, so that they stay in a CPU's cache."""
_NARROW = {1: torch.uint8, 2: torch.int16}


class RunningChecksums:
    """Adds up pieces while they pass. The sums of pieces on a GPU stay there until `result`."""

    def __init__(self) -> None:
        self._sums: dict[str, int | Tensor] = {}

    def passing(self, pieces: Iterable[WeightPiece]) -> Iterator[WeightPiece]:
        """Yield ``pieces``, unchanged."""
        for piece in pieces:
            self._add(piece)
            yield piece

    def _add(self, piece: WeightPiece) -> None:
        if piece.rows.numel():
            total = _sum_of_rows(piece.rows.detach(), piece.first_row)
            self._sums[piece.name] = self._sums.get(piece.name, 0) + total

    def result(self) -> Checksums:
        """Of every weight that had an element in a piece. Waits for the device, once."""
        totals = dict(self._sums)
        if waiting := {name: total for name, total in totals.items() if isinstance(total, Tensor)}:
            totals |= zip(waiting, torch.stack(list(waiting.values())).tolist(), strict=True)
        return {name: int(total) % _MODULUS for name, total in totals.items()}


def checksums(pieces: Iterable[WeightPiece]) -> Checksums:
    """The checksums of all weights in ``pieces``."""
    running = RunningChecksums()
    for _ in running.passing(pieces):
        pass
    return running.result()


def added(parts: Iterable[Mapping[str, int]]) -> Checksums:
    """The checksums of weights of which each of ``parts`` saw some rows."""
    total: Checksums = {}
    for part in parts:
        for name, value in part.items():
            total[name] = (total.get(name, 0) + value) % _MODULUS
    return total


def first_difference(sent: Mapping[str, int], held: Mapping[str, int]) -> str | None:
    """The first weight, in the order of ``held``, that differs or that one side lacks; None if all are equal."""
    return next((name for name in [*held, *sent] if held.get(name) != sent.get(name)), None)


def require_equal(who: str, step: int, sent: Iterable[Checksums], held: Mapping[str, int]) -> None:
    """Compare an engine's weights with what the policy sent.

    Args:
        who: the engine, for the message.
        step: completed steps of the weights.
        sent: checksums of what each policy rank sent.
        held: checksums of the engine's weights.

    Raises:
        WeightsDiffer: they differ.
    """
    if (name := first_difference(added(sent), held)) is not None:
        raise WeightsDiffer(
            f"{who}: its engine does not hold the weights after step {step} that the actor sent; {name} is the first "
            "that differs. Nothing that was sampled with them is used. If it happens again after a restart, use "
            "another node or another cluster.weight_sync"
        )


def _sum_of_rows(rows: Tensor, first_row: int) -> int | Tensor:
    """Of a piece, modulo 2^64. On a GPU, and where words are narrower than 32 bits, an int64 scalar."""
    flat = rows.reshape(rows.shape[0] if rows.dim() else 1, -1).contiguous()
    row_bytes = flat.shape[1] * flat.element_size()
    words = flat.view(torch.int32 if row_bytes % 4 == 0 else _NARROW[flat.element_size()])
    factors, row_factors = _factors(words.shape[1], first_row, len(words), words.device)
    if words.device.type == "cpu" and words.dtype == torch.int32:  # as fast as memory can be read
        sums = np.einsum("rc,c->r", words.numpy(), factors.numpy())
        return int(np.dot(sums.astype(np.int64), row_factors.numpy()))
    part = max(1, _WORDS_AT_ONCE // words.shape[1])
    sums = [(words[i : i + part].int() * factors).sum(-1, dtype=torch.int32) for i in range(0, len(words), part)]
    return (torch.cat(sums).long() * row_factors).sum()


@functools.lru_cache(maxsize=64)
def _factors(num_columns: int, first_row: int, num_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of the columns, int32 modulo 2^32, and of the rows, int64."""
    return _odd_numbers(0, num_columns, device).int(), _odd_numbers(first_row, num_rows, device)


def _odd_numbers(first: int, count: int, device: torch.device) -> Tensor:
    """int64 [count], a hash of each index from ``first`` on."""
    return _mix((torch.arange(first, first + count, device=device) + 1) * _GOLDEN) | 1


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finalizer, as in `counters`, on int64."""
    z = (z ^ _shifted(z, 30)) * _MIX_1
    z = (z ^ _shifted(z, 27)) * _MIX_2
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, shift: int) -> Tensor:
    return (z >> shift) & ((1 << (64 - shift)) - 1)  # torch shifts copies of the sign in
