"""Faster imports of heavy libraries: Python's garbage collector pauses, and transformers reads its directories once."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_OF_DIRECTORIES = "create_import_structure_from_path"
"""The function of transformers that reads what a directory of models holds."""


@contextmanager
def quick_imports() -> Iterator[None]:
    """Pause the garbage collector, and keep what was imported out of its later rounds.

    Modules stay: while torch and transformers are imported, the collector walks over them again and again and finds
    nothing. That is a fifth to a quarter of the processor time of such an import.
    """
    if not gc.isenabled():  # an outer pause, which ends later
        with _remembered_directories():
            yield
        return
    gc.disable()
    try:
        with _remembered_directories():
            yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def _remembered_directories() -> Iterator[None]:
    """Give a function of transformers a cache without a limit.

    Transformers reads the files of all its directories of models twice, in `transformers` and in `transformers.models`,
    since that function remembers the last 128 directories, and there are more. It takes a quarter of a second.
    """
    if "transformers" in sys.modules:
        yield
        return
    plain: Callable[..., Any] = functools.lru_cache

    def lru_cache(maxsize: Any = 128, typed: bool = False) -> Any:
        if getattr(maxsize, "__name__", None) == _OF_DIRECTORIES:
            return plain(maxsize=None)(maxsize)
        return plain(maxsize, typed)

    functools.lru_cache = lru_cache
    try:
        yield
    finally:
        functools.lru_cache = plain
