"""What the tools take on their command lines, and how they say that it is not right."""

from __future__ import annotations

import argparse

from safetensors_file import parse_size

from rlinf_lite.checkpoint.storage import Folder, absolute
from rlinf_lite.checkpoint.storage import folder as folder_of


def checkpoint_path(text: str) -> Folder:
    """A local path or any URL that fsspec knows. argparse shows the text of this error only."""
    try:
        return absolute(folder_of(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def size(text: str) -> int:
    """Bytes, as `parse_size` reads them."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
