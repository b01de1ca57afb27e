"""Imports what a config names by path: ``my_pkg.my_module:name`` or ``path/to/my_module.py:name``.

The driver does so before it starts any worker; a worker then imports it with the driver's search path.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rlinf_lite import fingerprints
from rlinf_lite.config import ConfigError, nearest
from rlinf_lite.paths import expand


@dataclass(frozen=True, kw_only=True, slots=True)
class UserCode:
    """A name of a module of the user, imported."""

    name: str
    module: ModuleType
    target: Any
    """What the module holds by that name."""

    def fingerprint(self) -> str:
        """Its name, and sha256 (hex) of the files of its module and of its definition."""
        files = [file for file in {vars(self.module).get("__file__"), _source_file(self.target)} if file is not None]
        digests = sorted(fingerprints.of_file(Path(file)) for file in files)
        return " ".join([self.name, *digests])


def search_path() -> list[str]:
    """Where to look for modules: the working directory, then ``sys.path``."""
    return [os.getcwd(), *filter(None, sys.path)]


def find(key: str, path: str, search: Sequence[str], *, what: str, example: str) -> UserCode:
    """Import what ``path`` names.

    Args:
        key: the config key that holds ``path``, for messages: ``"reward.path"``.
        search: `search_path` of the driver; relative file names start at its first directory.
        what: ``"function"`` or ``"class"``, for messages.
        example: what to write, for messages: ``"my_pkg.my_reward:score"``.

    Raises:
        ConfigError: it cannot be imported. Names key, path and remedy.
    """
    package, _, rest = example.partition(".")
    module_name, _, attribute = rest.partition(":")
    form = f"use {package}.{module_name}:{attribute}, or path/to/{module_name}.py:{attribute}"
    where, _, name = path.rpartition(":")
    if not where or not name.isidentifier():
        raise ConfigError(f"{key}={path}: names no {what}; {form}")
    sys.path += [directory for directory in search if directory not in sys.path]
    module = _load_file(key, path, search, form) if where.endswith(".py") else _import(key, path, search, form)
    if name not in vars(module):
        known = [known for known, value in vars(module).items() if callable(value) and not known.startswith("_")]
        raise ConfigError(f"{key}={path}: {where} has no {name!r}{nearest(name, known)}")
    return UserCode(name=name, module=module, target=vars(module)[name])


def failure(key: str, path: str, doing: str, error: BaseException) -> str:
    """The message for an error in the user's code, with its location."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{key}={path}: {doing} failed: {type(error).__name__}: {error}{where}"


def _load_file(key: str, path: str, search: Sequence[str], form: str) -> ModuleType:
    file_name = path.rpartition(":")[0]
    file = Path(search[0], expand(file_name)).resolve()
    if not file.is_file():
        raise ConfigError(f"{key}={path}: there is no file {file}; {form}")
    # Not the stem alone: a file called math.py must not replace the module math.
    name = f"{key.replace('.', '_')}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ConfigError(failure(key, path, f"importing {file_name}", error)) from None
    return module


def _import(key: str, path: str, search: Sequence[str], form: str) -> ModuleType:
    module = path.rpartition(":")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            where = f"looked in {search[0]} and on Python's search path (PYTHONPATH)"
            raise ConfigError(f"{key}={path}: there is no module {error.name!r}; {where}; {form}") from None
        raise ConfigError(failure(key, path, f"importing {module}", error)) from None
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ConfigError(failure(key, path, f"importing {module}", error)) from None


def _source_file(target: Any) -> str | None:
    defined = inspect.unwrap(target)
    try:
        is_plain = inspect.isroutine(defined) or isinstance(defined, type)
        return inspect.getsourcefile(defined if is_plain else type(defined))
    except TypeError:  # built in
        return None
