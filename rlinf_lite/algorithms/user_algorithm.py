"""Finds, makes and checks an algorithm of the user (``algorithm.path``)."""

from __future__ import annotations

from collections.abc import Sequence

from rlinf_lite import user_code
from rlinf_lite.algorithms.algorithm import Algorithm
from rlinf_lite.config import AlgorithmConfig, ConfigError
from rlinf_lite.types import Column

_KEY = "algorithm.path"
_METHODS = ("admit", "credit", "losses")


def build(path: str, config: AlgorithmConfig, search: Sequence[str] | None = None) -> Algorithm:
    """Call the class that ``path`` names with the section ``algorithm`` of the config.

    Raises:
        ConfigError: it cannot be imported or called, or what it makes is no `Algorithm`. Names path and remedy.
    """
    found = _find(path, search)
    if not callable(found.target):
        raise ConfigError(f"{_KEY}={path}: is a {type(found.target).__name__} that cannot be called; name a class")
    try:
        made = found.target(config)
        methods = {name: getattr(made, name, None) for name in _METHODS}
        needs = getattr(made, "needs", None)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ConfigError(user_code.failure(_KEY, path, f"{found.name}(config.algorithm)", error)) from None
    if missing := [name for name, method in methods.items() if not callable(method)]:
        raise ConfigError(f"{_KEY}={path}: has no method {missing[0]}; an algorithm has {', '.join(_METHODS)}")
    if not isinstance(needs, frozenset) or not needs <= set(Column):
        raise ConfigError(f"{_KEY}={path}: needs is {needs!r:.100}; set it to a frozenset of rlinf_lite.types.Column")
    algorithm: Algorithm = made
    return algorithm


def fingerprint(config: AlgorithmConfig) -> str | None:
    """Identifies the source of the user's algorithm; None if there is none.

    Raises:
        ConfigError: it cannot be imported.
    """
    return None if config.path is None else _find(config.path, None).fingerprint()


def _find(path: str, search: Sequence[str] | None) -> user_code.UserCode:
    search = user_code.search_path() if search is None else search
    return user_code.find(_KEY, path, search, what="class", example="my_pkg.my_algo:MyAlgorithm")
