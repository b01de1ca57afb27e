"""How records travel between driver and workers: thousands of small objects as a few columns.

Pickled one by one, a step's responses, scores and tensors take tens of milliseconds on either side.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from rlinf_lite.columns import columns_of, objects_of
from rlinf_lite.types import Group, Prompt, Response, Segments, TokenBatch

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Reduced = tuple[Callable[..., Any], tuple[Any, ...]]

_UNIT_TENSORS = ("ids_N", "positions_N", "source_M", "targets_M", "seq_M")
_SEGMENT_TENSORS = ("start_S", "stop_S", "parent_S")


class Columns(list[T]):
    """Objects of one dataclass. It is pickled column by column, and arrives as a plain list."""

    def __reduce__(self) -> Reduced:
        if not self:
            return list, ()
        kind: type[T] = type(self[0])
        columns = {name: _column(values) for name, values in columns_of(kind, self).items()}
        return _rows, (kind, len(self), columns)


class _Arrays:
    """Arrays of one dtype, end to end."""

    def __init__(self, whole: np.ndarray, lengths: Sequence[int]) -> None:
        self._whole, self._lengths = whole, lengths

    def split(self) -> list[np.ndarray]:
        stops = np.cumsum(self._lengths).tolist()
        return [self._whole[stop - length : stop] for stop, length in zip(stops, self._lengths, strict=True)]


def _column(values: list[Any]) -> Any:
    first = values[0]
    if not isinstance(first, np.ndarray):
        return values
    if any(not isinstance(each, np.ndarray) or each.ndim != 1 or each.dtype != first.dtype for each in values):
        return values
    return _Arrays(np.concatenate(values), [len(each) for each in values])


def _rows(kind: type[T], number: int, columns: Mapping[str, Any]) -> list[T]:
    lists = {name: column.split() if isinstance(column, _Arrays) else column for name, column in columns.items()}
    return objects_of(kind, lists, number)


class Groups(list[Group]):
    """Groups. They are pickled with the columns of their responses, and arrive as a plain list."""

    def __reduce__(self) -> Reduced:
        responses: Columns[Response] = Columns(response for group in self for response in group.responses)
        sizes = [len(group.responses) for group in self]
        return _groups, (Columns(group.prompt for group in self), sizes, responses)


def _groups(prompts: Sequence[Prompt], sizes: Sequence[int], responses: Sequence[Response]) -> list[Group]:
    stops = np.cumsum(sizes).tolist()
    return [
        Group(prompt=prompt, responses=tuple(responses[stop - size : stop]))
        for prompt, size, stop in zip(prompts, sizes, stops, strict=True)
    ]


def _reduced(unit: TokenBatch) -> Reduced:
    """A unit as two arrays, of its integers and of its columns: a tensor by itself takes a tenth of a millisecond."""
    import torch  # the driver imports it later than this module

    integers = [getattr(unit, name) for name in _UNIT_TENSORS]
    integers += [getattr(unit.segments, name) for name in _SEGMENT_TENSORS]
    columns = list(unit.columns.values())
    return _unit, (
        unit.index,
        unit.num_responses,
        torch.cat(integers).numpy(),
        [len(each) for each in integers],
        list(unit.columns),
        torch.stack(columns).numpy() if columns else None,
    )


def _unit(
    index: int,
    num_responses: int,
    integers: np.ndarray,
    lengths: Sequence[int],
    names: Sequence[Any],
    values: np.ndarray | None,
) -> TokenBatch:
    import torch

    def own(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.copy())  # shared memory must not be written

    parts = [part.clone() for part in own(integers).split(list(lengths))]
    tensors = dict(zip(_UNIT_TENSORS, parts[: len(_UNIT_TENSORS)], strict=True))
    segments = Segments(**dict(zip(_SEGMENT_TENSORS, parts[len(_UNIT_TENSORS) :], strict=True)))
    columns = {} if values is None else {name: own(value) for name, value in zip(names, values, strict=True)}
    return TokenBatch(index=index, num_responses=num_responses, **tensors, segments=segments, columns=columns)


copyreg.pickle(TokenBatch, _reduced)
