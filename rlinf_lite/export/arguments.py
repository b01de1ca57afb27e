"""Types of the converters' command-line arguments."""

from __future__ import annotations

import argparse

from rlinf_lite.checkpoint.storage import StoragePath, absolute, storage_path
from rlinf_lite.export.safetensors_file import parse_size


def checkpoint_path(text: str) -> StoragePath:
    """A local path or any URL that fsspec knows.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    try:
        return absolute(storage_path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def size(text: str) -> int:
    """Bytes, see `parse_size`.

    Raises:
        argparse.ArgumentTypeError: it is not a size.
    """
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
