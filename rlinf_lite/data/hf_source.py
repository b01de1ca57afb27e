"""Reads rows with the `datasets` library: ``hf:NAME[:CONFIG]:SPLIT``, and directories that ``save_to_disk`` wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlinf_lite.data.arrow import exact_row, has_narrow_floats
from rlinf_lite.data.errors import DataError
from rlinf_lite.data.files import Meter, refuse_special
from rlinf_lite.data.rows import Row

_ROWS_PER_BATCH = 1024
_SPEC = re.compile(r"hf:(?P<name>[^:]+)(?::(?P<config>[^:\[\]]+))?:(?P<split>[^:\[\]]+(?:\[[^\]]*\])?)")


@dataclass(frozen=True, slots=True)
class HubDataset:
    """A data set on the Hugging Face hub, or in a local directory that `load_dataset` understands."""

    name: str
    config: str | None
    split: str


def parse_hub_path(path: str) -> HubDataset:
    """``"hf:openai/gsm8k:main:train[:100]"`` -> its parts.

    Raises:
        DataError: not of the form ``hf:NAME[:CONFIG]:SPLIT``.
    """
    match = _SPEC.fullmatch(path)
    if match is None:
        raise DataError(f"{path}: expected hf:NAME[:CONFIG]:SPLIT, for example hf:openai/gsm8k:main:train")
    return HubDataset(match["name"], match["config"], match["split"])


def read_hub(path: str, meter: Meter) -> Iterator[Row]:
    """Yield the rows of ``hf:NAME[:CONFIG]:SPLIT``, after downloading the split to the cache of `datasets`.

    Raises:
        DataError: the data set, configuration or split is unknown, or cannot be downloaded.
    """
    spec, datasets = parse_hub_path(path), _datasets(path)
    try:
        table = datasets.load_dataset(spec.name, spec.config, split=spec.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{path}: {reason}; check name, configuration, split, and the network") from None
    yield from _rows(path, table)


def read_saved(path: str, meter: Meter) -> Iterator[Row]:
    """Yield the rows of a directory that ``Dataset.save_to_disk`` wrote.

    Raises:
        DataError: the directory holds several splits, or `datasets` cannot read it.
    """
    splits = Path(path, "dataset_dict.json")
    if splits.exists():
        names = ", ".join(sorted(child.name for child in Path(path).iterdir() if child.is_dir()))
        raise DataError(f"{path}: a directory of splits ({names}); name one of them, as {path}/SPLIT")
    if not Path(path, "state.json").exists():
        raise DataError(
            f"{path}: a directory not written by datasets.save_to_disk (no state.json); name a file in it, or "
            f"hf:{path}:SPLIT"
        )
    for child in Path(path).iterdir():
        refuse_special(child, path)
    datasets = _datasets(path)
    try:
        table = datasets.load_from_disk(path)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: not readable by datasets.load_from_disk ({error}); save it again") from None
    yield from _rows(path, table)


def _datasets(path: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{path}: reading it needs the package datasets; pip install datasets") from None
    return datasets


def _rows(path: str, table: Any) -> Iterator[Row]:
    narrow = has_narrow_floats(table.features.arrow_schema)
    for first in range(0, len(table), _ROWS_PER_BATCH):
        columns = table[first : first + _ROWS_PER_BATCH]
        names = list(columns)
        for index, values in enumerate(zip(*columns.values(), strict=True), start=first):
            exact = partial(_exact, table, index) if narrow else None
            yield Row(path=path, line=index + 1, fields=dict(zip(names, values, strict=True)), exact=exact)


def _exact(table: Any, index: int) -> dict[str, Any]:
    return exact_row(table.with_format("arrow")[index : index + 1], 0)
