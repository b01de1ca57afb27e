"""Many objects of one dataclass with slots, a field at a time: their constructor takes most of the time of a step's
thousands of records.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

T = TypeVar("T")


def columns_of(kind: type[T], objects: Sequence[T]) -> dict[str, list[Any]]:
    """The values of every field of ``objects``, by name."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return {name: list(map(getattr(kind, name).__get__, objects)) for name in names}


def objects_of(kind: type[T], columns: Mapping[str, Iterable[Any]], number: int) -> list[T]:
    """Make ``number`` objects; nothing checks them, and no default is filled in.

    Args:
        columns: ``number`` values of every field.
    """
    made = [object.__new__(kind) for _ in range(number)]
    for name, values in columns.items():
        deque(map(getattr(kind, name).__set__, made, values), maxlen=0)
    return made


def replaced(objects: Sequence[T], **columns: Iterable[Any]) -> list[T]:
    """Copy ``objects``, all of one dataclass, with other values in the named fields: `dataclasses.replace` of each."""
    if not objects:
        return []
    kind = type(objects[0])
    return objects_of(kind, columns_of(kind, objects) | columns, len(objects))
