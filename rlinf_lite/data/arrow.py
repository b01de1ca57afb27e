"""Reads 16 and 32-bit floats of Arrow tables exactly: as Python floats they gain digits (0.1 is 0.10000000149...)."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa


def has_narrow_floats(schema: pa.Schema) -> bool:
    """Whether any column, or a field nested in it, has 16 or 32-bit floats."""
    return any(_is_narrow(field.type) for field in schema)


def exact_row(table: pa.Table | pa.RecordBatch, index: int) -> dict[str, Any]:
    """The row as Python values; each narrow float is the `Decimal` with the fewest digits that identify it."""
    return {name: _exact(table.column(name)[index]) for name in table.schema.names}


def _is_narrow(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    if types.is_float32(kind) or types.is_float16(kind):
        return True
    return any(_is_narrow(kind.field(index).type) for index in range(kind.num_fields))


def _exact(scalar: pa.Scalar) -> Any:
    import pyarrow.types as types

    if not scalar.is_valid:
        return None
    kind = scalar.type
    if types.is_float32(kind) or types.is_float16(kind):
        width = np.float32 if types.is_float32(kind) else np.float16
        return Decimal(str(width(scalar.as_py())))
    if types.is_struct(kind):
        return {name: _exact(value) for name, value in scalar.items()}
    if types.is_list(kind) or types.is_large_list(kind):
        return [_exact(value) for value in scalar]
    return scalar.as_py()
