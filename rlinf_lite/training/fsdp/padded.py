"""Lays a unit out as rows for a model that computes whole sequences: prompt and response per row, right padded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlinf_lite.types import TokenBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedRows:
    """The sequences of a unit's B responses, T tokens the longest; and where its M loss tokens are predicted."""

    ids_BT: Tensor
    """int64; 0 in the padding. Under a causal mask no token attends to what is on its right."""
    rows_M: Tensor
    columns_M: Tensor


def padded_rows(unit: TokenBatch) -> PaddedRows:
    """Lay out every response of ``unit`` with all its ancestors."""
    segments = unit.segments
    starts, stops, parents = segments.start_S.tolist(), segments.stop_S.tolist(), segments.parent_S.tolist()
    leaves = [segment for segment in range(len(parents)) if segment not in set(parents)]
    assert len(leaves) == unit.num_responses
    sequences = []
    for leaf in leaves:
        chain, segment = [], leaf
        while segment >= 0:
            chain.append(unit.ids_N[starts[segment] : stops[segment]])
            segment = parents[segment]
        sequences.append(torch.cat(chain[::-1]))
    return PaddedRows(
        ids_BT=torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True),
        rows_M=unit.seq_M,
        columns_M=unit.positions_N[unit.source_M],
    )
