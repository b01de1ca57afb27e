"""What the tools take on their command lines, and how they say that it is not right."""

from __future__ import annotations

import argparse

from rlinf_lite.checkpoint.storage import StoragePath, absolute
from rlinf_lite.checkpoint.storage import storage_path as path_of
from rlinf_lite.export.safetensors_file import parse_size


def checkpoint_path(text: str) -> StoragePath:
    """A local path or any URL that fsspec knows. argparse shows the text of this error only."""
    try:
        return absolute(path_of(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def size(text: str) -> int:
    """Bytes, as `parse_size` reads them."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
