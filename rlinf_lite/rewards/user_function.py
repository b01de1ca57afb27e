"""Finds and checks the user's reward function: ``my_pkg.my_reward:score`` or ``path/to/my_reward.py:score``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlinf_lite import user_code
from rlinf_lite.config import ConfigError

OFFERED = ("prompt", "response", "answer", "finished", "metadata")
"""Names of the parameters that a function may have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UserFunction:
    """The user's function, imported and checked."""

    key: str
    """The config key that holds ``path``: ``"reward.path"``, or ``"reward.functions.0.path"``."""
    path: str
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
            raise ConfigError(user_code.failure(self.key, self.path, f"{self.target.__name__}()", error)) from None
        return instance


def find(key: str, path: str, search: Sequence[str]) -> UserFunction:
    """Import the function that ``path`` names, and check that it can be called.

    Args:
        key: the config key that holds ``path``.
        search: `search_path` of the driver; relative file names start at its first directory.

    Raises:
        ConfigError: it cannot be imported or called. Names path and remedy.
    """
    found = user_code.find(key, path, search, what="function", example="my_pkg.my_reward:score")
    return UserFunction(
        key=key,
        path=path,
        target=found.target,
        parameters=tuple(_parameters(f"{key}={path}", found.target)),
        fingerprint=found.fingerprint(),
    )


def _parameters(subject: str, target: Any) -> Iterator[str]:
    """The names in `OFFERED` that ``target`` has as parameters."""
    for parameter in _signature(subject, target):
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
                f"{subject}: has a parameter {parameter.name!r}; it may have "
                f"{', '.join(OFFERED)} (metadata holds the columns named in data.metadata_keys)"
            )


def _signature(subject: str, target: Any) -> list[inspect.Parameter]:
    """The parameters of the call that grades one response."""
    call, bound = target, 0
    if isinstance(target, type):
        if needed := [parameter.name for parameter in _named_of(subject, target) if _is_needed(parameter)]:
            raise ConfigError(f"{subject}: is a class that needs {', '.join(needed)}; give these parameters defaults")
        call = next((vars(base)["__call__"] for base in target.__mro__ if "__call__" in vars(base)), None)
        bound = 0 if isinstance(call, staticmethod) else 1
    if not callable(call):
        raise ConfigError(f"{subject}: is a {type(target).__name__} that cannot be called; name a function")
    if inspect.iscoroutinefunction(call):
        raise ConfigError(f"{subject}: is async; name a plain function (it may call asyncio.run)")
    return _named_of(subject, call)[bound:]


def _named_of(subject: str, call: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(call).parameters.values())
    except ValueError:
        raise ConfigError(
            f"{subject}: its parameters cannot be determined; wrap it in a function of your own"
        ) from None


def _is_needed(parameter: inspect.Parameter) -> bool:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.default is inspect.Parameter.empty and parameter.kind not in variadic
