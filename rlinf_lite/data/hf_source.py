"""Rows through the `datasets` library: ``hf:NAME[:CONFIG]:SPLIT`` and folders written by ``save_to_disk``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlinf_lite.data.errors import DataError
from rlinf_lite.data.rows import Row

_SPEC = re.compile(r"hf:(?P<name>[^:]+)(?::(?P<config>[^:\[\]]+))?:(?P<split>[^:\[\]]+(?:\[[^\]]*\])?)")


@dataclass(frozen=True, slots=True)
class HubDataset:
    """A data set of the Hugging Face hub (or a local folder that `load_dataset` understands)."""

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


def read_hub(path: str) -> Iterator[Row]:
    """Rows of ``hf:NAME[:CONFIG]:SPLIT``; the split is downloaded to the datasets cache first.

    Raises:
        DataError: an unknown data set, configuration or split, or no way to download it.
    """
    spec, datasets = parse_hub_path(path), _datasets(path)
    try:
        table = datasets.load_dataset(spec.name, spec.config, split=spec.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{path}: {reason}; check name, configuration, split, and the network") from None
    yield from _rows(path, table)


def read_saved(path: str) -> Iterator[Row]:
    """Rows of a folder that ``Dataset.save_to_disk`` wrote.

    Raises:
        DataError: a folder of several splits, or one that `datasets` cannot read.
    """
    splits = Path(path, "dataset_dict.json")
    if splits.exists():
        names = ", ".join(sorted(child.name for child in Path(path).iterdir() if child.is_dir()))
        raise DataError(f"{path}: a folder of splits ({names}); name one of them, as {path}/SPLIT")
    if not Path(path, "state.json").exists():
        raise DataError(
            f"{path}: a folder not written by datasets.save_to_disk (no state.json); name a file in it, or "
            f"hf:{path}:SPLIT"
        )
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


def _rows(path: str, table: Iterable[dict[str, Any]]) -> Iterator[Row]:
    for line, fields in enumerate(table, start=1):
        yield Row(path=path, line=line, fields=fields)
