"""Check the files of a model directory before a library reads them, whose errors do not name the file."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from rlinf_lite.errors import ConfigError

_LFS = b"version https://git-lfs"
_FETCH = "download the model again (from the hub: hf download NAME --local-dir DIR)"
_CHECKED_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".safetensors")


def check_files(directory: Path, key: str) -> None:
    """Check that every file can be read.

    Args:
        key: the config key that names ``directory``, for messages.

    Raises:
        ConfigError: a file is not a regular file, is only a Git LFS pointer, or is invalid JSON; names file and line.
    """
    for file in sorted(directory.iterdir()):
        if file.suffix not in _CHECKED_SUFFIXES:
            continue
        if not file.exists():
            raise ConfigError(f"{key}={directory}: {file.name} is a broken symbolic link; {_FETCH}")
        if not stat.S_ISREG(file.stat().st_mode):
            raise ConfigError(f"{key}={directory}: {file.name} is not a regular file; {_FETCH}")
        with file.open("rb") as stream:
            if stream.read(len(_LFS)) == _LFS:
                raise ConfigError(
                    f"{key}={directory}: {file.name} is a Git LFS pointer, not the file; run git lfs pull"
                )
        if file.suffix == ".json":
            read_json(file, key)


def read_json(file: Path, key: str) -> Any:
    """Parse a JSON file of a model directory.

    Raises:
        ConfigError: it is invalid; names file, line and column.
    """
    where = f"{key}={file.parent}: {file.name}"
    try:
        return json.loads(file.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        spot = f"line {error.lineno} column {error.colno}"
        raise ConfigError(f"{where}: not valid JSON at {spot} ({error.msg}); correct it, or {_FETCH}") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: not readable as JSON ({error}); {_FETCH}") from None


def read_object(file: Path, key: str) -> dict[str, Any]:
    """As `read_json`, for a file that must hold one object."""
    value = read_json(file, key)
    if not isinstance(value, dict):
        raise ConfigError(f"{key}={file.parent}: {file.name} holds a {type(value).__name__}, not an object; {_FETCH}")
    return value
