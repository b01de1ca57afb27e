"""What a user has written for a key, before and after it is typed: single values for lists, text, paths."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlinf_lite import paths


def is_text(kind: Any) -> bool:
    """Whether a declared type takes text alone, or null besides."""
    return kind is str or set(typing.get_args(kind)) == {str, NoneType}


def is_list(kind: Any) -> bool:
    """Whether a declared type is a list."""
    return typing.get_origin(kind) is list


def read(given: DictConfig, kinds: Mapping[str, Any]) -> list[str]:
    """Make a single text a list where a list belongs, in place.

    Args:
        given: what YAML and overrides have set.
        kinds: the declared type of each key.

    Returns:
        A line for each key that takes text and got what YAML has read as a number: ``1e3`` would become ``1000.0``.
    """
    problems: list[str] = []
    for key, kind in kinds.items():
        section, _, name = key.rpartition(".")
        node = _section(given, section)
        if node is None or name not in node or OmegaConf.is_interpolation(node, name):
            continue
        inner = node._get_node(name)
        value: Any = OmegaConf.to_container(inner) if OmegaConf.is_config(inner) else node[name]
        if is_text(kind):
            problems += _not_text(key, value, null_is_fine=kind is not str)
        elif is_list(kind) and isinstance(value, str):
            node[name] = [value]
        elif is_list(kind) and not isinstance(value, list):
            shown = "null" if value is None else value
            problems.append(f"{key}={shown}: takes a list; write {key}=[first,second], or {key}=[] for none")
        elif kind == list[str]:
            problems += [line for item in value for line in _not_text(key, item, null_is_fine=False)]
    return problems


def _section(given: DictConfig, section: str) -> DictConfig | None:
    node: Any = given
    for name in section.split("."):
        if not isinstance(node, DictConfig) or name not in node or OmegaConf.is_interpolation(node, name):
            return None
        node = node._get_node(name)
    return node if isinstance(node, DictConfig) else None


def _not_text(key: str, value: Any, *, null_is_fine: bool) -> Iterator[str]:
    if isinstance(value, str) or (value is None and null_is_fine):
        return
    if value is None or isinstance(value, bool):
        read_as = str(value).lower().replace("none", "null")
    elif isinstance(value, int | float):
        read_as = f"the number {value}"
    else:
        yield f"{key}={value}: takes text"
        return
    yield f'{key}: takes text, but YAML reads what is there as {read_as}; write it in quotes, {key}: "..."'


def expand_paths(config: Any) -> list[str]:
    """Replace a leading ``~`` in every path of a typed config, in place.

    Returns:
        A line for each value that is no path.
    """
    problems: list[str] = []
    _expand(config, "", problems)
    return problems


def _expand(node: Any, prefix: str, problems: list[str]) -> None:
    for spec in dataclasses.fields(node):
        value, key = getattr(node, spec.name), f"{prefix}{spec.name}"
        if dataclasses.is_dataclass(value):
            _expand(value, f"{key}.", problems)
        elif spec.metadata.get("path") and value is not None:
            try:
                expanded = [paths.expand(one) for one in value] if isinstance(value, list) else paths.expand(value)
            except ValueError as error:
                problems.append(f"{key}={value}: {error}")
            else:
                setattr(node, spec.name, expanded)
