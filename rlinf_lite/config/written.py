"""Values as users write them, converted to the type of their key: single texts for lists, numbers in quotes, ``yes``.

pydantic then checks what is left to check with types that fit exactly. The conversions are those of OmegaConf's typed
nodes, so a YAML means the same under both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import NoneType
from typing import Any, get_args, get_origin

from rlinf_lite.config.schema import is_list, is_section, is_text

TAKES = {
    int: "takes a whole number",
    float: "takes a number",
    bool: "takes true or false",
    str: "takes text",
    dict: "takes a mapping such as {name: value}",
}
"""What to write for a key of this type."""
_TRUE = ("yes", "y", "on", "true")
_FALSE = ("no", "n", "off", "false")


def shown(value: Any) -> str:
    """A value as YAML spells it; text in quotes only if it would be hard to see otherwise."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and (value != value.strip() or not value or not value.isprintable()):
        return repr(value)
    return str(value)


def problems_of(key: str, value: Any, kind: Any) -> list[str]:
    """What is wrong with a value before interpolations are resolved: one line per problem.

    Text that YAML has read as a number or a boolean is refused: ``1e3`` would become ``1000.0``.
    """
    if is_text(kind):
        return list(_not_text(key, value, null_is_fine=kind is not str))
    if is_list(kind) and not isinstance(value, list | str):
        return [f"{key}={shown(value)}: takes a list; write {key}=[first,second], or {key}=[] for none"]
    if kind == list[str] and isinstance(value, list):
        return [line for item in value for line in _not_text(key, item, null_is_fine=False)]
    try:
        typed(value, kind)
    except ValueError as error:
        return [f"{key}={shown(value)}: {error}"]
    return []


def _not_text(key: str, value: Any, *, null_is_fine: bool) -> Iterator[str]:
    if isinstance(value, str) or (value is None and null_is_fine):
        return
    if value is None or isinstance(value, bool):
        read_as = shown(value)
    elif isinstance(value, int | float):
        read_as = f"the number {value}"
    else:
        yield f"{key}={value}: takes text"
        return
    yield f'{key}: takes text, but YAML reads what is there as {read_as}; write it in quotes, {key}: "..."'


def typed(value: Any, kind: Any) -> Any:
    """``value`` converted to the plain type of its key.

    Raises:
        ValueError: it does not fit; the text says what the key takes.
    """
    options = [option for option in get_args(kind) if option is not NoneType]
    if NoneType in get_args(kind) and value is None:
        return None
    if get_origin(kind) is list:
        return _typed_list(value, kind)
    if get_origin(kind) is dict or is_section(kind):
        if isinstance(value, dict) and all(isinstance(name, str) for name in value):
            return value
        raise ValueError(TAKES[dict])
    if len(options) > 1:  # runner.max_time: nothing is converted
        if type(value) not in options:
            raise ValueError("takes text or a number")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("must be a finite number")
        return value
    return _scalar(value, options[0] if options else kind)


def _typed_list(value: Any, kind: Any) -> list[Any]:
    (item_kind,) = get_args(kind)
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise ValueError("takes a list")
    return value if item_kind is Any else [typed(item, item_kind) for item in value]


def _scalar(value: Any, kind: type) -> Any:
    if value is None or isinstance(value, list | dict | bytes):
        raise ValueError(TAKES[kind])
    try:
        if kind is bool:
            return _boolean(value)
        if kind is str:
            return str(value)
        if isinstance(value, bool) or (kind is int and isinstance(value, float)):
            raise ValueError
        return kind(value)
    except OverflowError:
        return math.inf  # a whole number that no float can hold: refused as not finite
    except ValueError:
        raise ValueError(TAKES[kind]) from None


def _boolean(value: Any) -> bool:
    if isinstance(value, int):
        return value != 0
    if isinstance(value, str):
        word = value.lower()
        if word in (*_TRUE, *_FALSE):
            return word in _TRUE
        return int(value) != 0
    raise ValueError
