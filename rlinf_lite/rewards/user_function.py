"""Finds and checks the user's reward function: ``my_pkg.my_reward:score`` or ``path/to/my_reward.py:score``.

The driver checks it before it starts any worker. Each reward worker then imports it with the driver's search path.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rlinf_lite import fingerprints
from rlinf_lite.config import ConfigError, nearest
from rlinf_lite.paths import expand

OFFERED = ("prompt", "response", "answer", "finished", "metadata")
"""Names of the parameters that a function may have."""

_FORM = "use my_pkg.my_reward:score, or path/to/my_reward.py:score"


@dataclass(frozen=True, kw_only=True, slots=True)
class UserFunction:
    """The user's function, imported and checked."""

    path: str
    """``reward.path`` as configured."""
    target: Callable[..., Any]
    """A function, a callable object, or a class of callable objects."""
    parameters: tuple[str, ...]
    """The names in `OFFERED` that are its parameters."""
    fingerprint: str
    """Its name, and sha256 (hex) of the files of its module and of its definition."""

    def ready(self) -> Callable[..., Any]:
        """The callable to call per response; a class is instantiated once.

        Raises:
            ConfigError: the class cannot be instantiated.
        """
        if not isinstance(self.target, type):
            return self.target
        try:
            instance: Callable[..., Any] = self.target()
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise ConfigError(_failure(self.path, f"{self.target.__name__}()", error)) from None
        return instance


def search_path() -> list[str]:
    """Where to look for modules: the working directory, then ``sys.path``."""
    return [os.getcwd(), *filter(None, sys.path)]


def find(path: str, search: Sequence[str]) -> UserFunction:
    """Import the function that ``path`` names, and check that it can be called.

    Args:
        path: ``reward.path``.
        search: `search_path` of the driver; relative file names start at its first directory.

    Raises:
        ConfigError: it cannot be imported or called. Names path and remedy.
    """
    where, _, name = path.rpartition(":")
    if not where or not name.isidentifier():
        raise ConfigError(f"reward.path={path}: names no function; {_FORM}")
    sys.path += [directory for directory in search if directory not in sys.path]
    module = _load_file(path, where, search) if where.endswith(".py") else _import(path, where, search)
    if name not in vars(module):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"reward.path={path}: {where} has no {name!r}{nearest(name, known)}")
    target = vars(module)[name]
    parameters = tuple(_parameters(path, target))
    return UserFunction(path=path, target=target, parameters=parameters, fingerprint=_fingerprint(name, module, target))


def _load_file(path: str, file_name: str, search: Sequence[str]) -> ModuleType:
    file = Path(search[0], expand(file_name)).resolve()
    if not file.is_file():
        raise ConfigError(f"reward.path={path}: there is no file {file}; {_FORM}")
    name = f"reward_path_{file.stem}"  # not the stem alone: a file called math.py must not replace the module math
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ConfigError(_failure(path, f"importing {file_name}", error)) from None
    return module


def _import(path: str, module: str, search: Sequence[str]) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            where = f"looked in {search[0]} and on Python's search path (PYTHONPATH)"
            raise ConfigError(f"reward.path={path}: there is no module {error.name!r}; {where}; {_FORM}") from None
        raise ConfigError(_failure(path, f"importing {module}", error)) from None
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ConfigError(_failure(path, f"importing {module}", error)) from None


def _parameters(path: str, target: Any) -> Iterator[str]:
    """The names in `OFFERED` that ``target`` has as parameters."""
    for parameter in _signature(path, target):
        has_default = parameter.default is not inspect.Parameter.empty
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            yield from OFFERED
            return
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            continue
        if parameter.kind is not inspect.Parameter.POSITIONAL_ONLY and parameter.name in OFFERED:
            yield parameter.name
        elif not has_default:
            raise ConfigError(
                f"reward.path={path}: has a parameter {parameter.name!r}; it may have "
                f"{', '.join(OFFERED)} (metadata holds the columns named in data.metadata_keys)"
            )


def _signature(path: str, target: Any) -> list[inspect.Parameter]:
    """The parameters of the call that grades one response."""
    call, bound = target, 0
    if isinstance(target, type):
        if needed := [parameter.name for parameter in _named_of(path, target) if _is_needed(parameter)]:
            raise ConfigError(
                f"reward.path={path}: is a class that needs {', '.join(needed)}; give these parameters defaults"
            )
        call = next((vars(base)["__call__"] for base in target.__mro__ if "__call__" in vars(base)), None)
        bound = 0 if isinstance(call, staticmethod) else 1
    if not callable(call):
        raise ConfigError(f"reward.path={path}: is a {type(target).__name__} that cannot be called; name a function")
    if inspect.iscoroutinefunction(call):
        raise ConfigError(f"reward.path={path}: is async; name a plain function (it may call asyncio.run)")
    return _named_of(path, call)[bound:]


def _named_of(path: str, call: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(call).parameters.values())
    except ValueError:
        raise ConfigError(
            f"reward.path={path}: its parameters cannot be determined; wrap it in a function of your own"
        ) from None


def _is_needed(parameter: inspect.Parameter) -> bool:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.default is inspect.Parameter.empty and parameter.kind not in variadic


def _fingerprint(name: str, module: ModuleType, target: Any) -> str:
    files = [file for file in {vars(module).get("__file__"), _source_file(target)} if file is not None]
    digests = sorted(fingerprints.of_file(Path(file)) for file in files)
    return " ".join([name, *digests])


def _source_file(target: Any) -> str | None:
    defined = inspect.unwrap(target)
    try:
        is_plain = inspect.isroutine(defined) or isinstance(defined, type)
        return inspect.getsourcefile(defined if is_plain else type(defined))
    except TypeError:  # built in
        return None


def _failure(path: str, doing: str, error: BaseException) -> str:
    """The message for an error in the user's code, with its location."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"reward.path={path}: {doing} failed: {type(error).__name__}: {error}{where}"
