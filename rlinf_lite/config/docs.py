"""Generates ``docs/config.md`` and the list of keys from the schema."""

from __future__ import annotations

import itertools
import re
import typing
from collections.abc import Iterator
from types import NoneType
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from omegaconf import MISSING
from pydantic import AfterValidator

from rlinf_lite.config import rlinf
from rlinf_lite.config.fields import MOST_COUNT, MOST_SECONDS, positive_or_off
from rlinf_lite.config.rlinf_keys import TAKEN
from rlinf_lite.config.schema import Key, is_list, is_section, keys, section_of_items
from rlinf_lite.config.written import shown

_INTRODUCTION = """# Config keys

<!-- Written by `python -m rlinf_lite.config --write`. Do not edit: change the docstrings in `rlinf_lite/config/`. -->

Every key, with the values it takes, its default and its meaning. Set a key in the YAML, or on the command line as
`key=value`.
`python -m rlinf_lite.config KEY` prints one key or section.

- A key marked **n** (neutral) cannot change the numbers of a run. All other keys are part of the run's identity: a
  resume that changes one is refused, unless `runner.resume_allow_changes` names it.
- A default such as `${actor.model.model_path}` takes the value of that key. *required* means that there is no default.
- Whole numbers without another limit are at most 2147483647, and durations at most 1e8 seconds.
"""
_OF_RLINF = """
## Keys of RLinf's

RLinf's examples for Megatron and FSDP have these keys, too. Each sets a key above, or says what happens here anyway.
Where a value has no effect, a note at the start says so; any other value is refused by name. None is kept: the config
that a run writes has the keys above only.

| key | values | meaning |
|---|---|---|
"""
_WIDEST_CELL = 120
_KINDS = {int: "whole number", float: "number", bool: "true or false", str: "text", dict: "mapping"}


def markdown() -> str:
    """The page of all keys: a table per section, and below it what does not fit into a cell."""
    by_section: dict[str, dict[str, Key]] = {}
    for name, key in _every_key():
        section, _, last = name.rpartition(".")
        by_section.setdefault(section, {})[last] = key
    rows = "".join(f"| {names} | {rlinf.values(key)} | {rlinf.meaning(key)} |\n" for names, key in _of_rlinf())
    return _INTRODUCTION + "".join(_section(name, found) for name, found in by_section.items()) + _OF_RLINF + rows


def _of_rlinf() -> Iterator[tuple[str, str]]:
    """(keys of one section that are taken alike, the first of them)."""
    for _, group in itertools.groupby(TAKEN, lambda key: (key.rpartition(".")[0], id(TAKEN[key]))):
        first, *others = group
        names = ", ".join([first, *(f".{key.rpartition('.')[2]}" for key in others)])
        yield f"`{names}`", first


def _every_key() -> Iterator[tuple[str, Key]]:
    """All keys, and after a list of sections the keys of its items, as ``reward.functions[].weight``."""
    for name, key in keys().items():
        yield name, key
        if section := section_of_items(key.kind):
            yield from ((f"{name}[].{inner}", spec) for inner, spec in keys(section).items())


def _section(name: str, found: dict[str, Key]) -> str:
    table = [f"\n## {name}\n", "| key | values | default | meaning |", "|---|---|---|---|"]
    notes = []
    for last, key in found.items():
        summary, rest = _split(key.description.replace("``", "`"))
        mark = " **n**" if key.neutral else ""
        cells = (f"`{last}`{mark}", values(key), _default(key), summary.replace("|", "\\|"))
        table.append(f"| {' | '.join(cells)} |")
        if rest:
            notes.append(f"- `{last}`: {rest}")
    return "\n".join([*table, *(["", *notes] if notes else []), ""])


def _split(description: str) -> tuple[str, str]:
    """What stands in the table, and what below it: the first sentence and the others, or all of it below."""
    first, *others = re.split(r"(?<=\.)\s+", description, maxsplit=1)
    return (first, " ".join(others)) if len(first) <= _WIDEST_CELL else ("see below", description)


def listing() -> str:
    """One line per key: name, values, default, and ``neutral`` if it is; RLinf's keys last."""
    lines = (
        f"{name}  {values(key, code=False)}  {shown(key.default)}{'  neutral' if key.neutral else ''}"
        for name, key in _every_key()
    )
    of_rlinf = (f"{key}  {rlinf.values(key, code=False)}  of RLinf" for key in TAKEN)
    return "\n".join([*lines, *of_rlinf]) + "\n"


def text(prefix: str) -> str:
    """The keys below a section, or one key, for a terminal; empty if there are none."""
    of_rlinf = (f"{key}  ({rlinf.values(key, code=False)})\n    {rlinf.meaning(key)}" for key in TAKEN if key == prefix)
    ours = (
        f"{name}={shown(key.default)}  ({values(key, code=False)}{', neutral' if key.neutral else ''})\n"
        f"    {key.description}"
        for name, key in _every_key()
        if name == prefix or name.startswith((f"{prefix}.", f"{prefix}[")) or not prefix
    )
    return "\n".join([*ours, *of_rlinf])


def values(key: Key, *, code: bool = True) -> str:
    """What a key takes: its choices, or its type and limits.

    Args:
        code: mark choices as code, for Markdown.
    """
    if key.choices:
        choices = ", ".join(f"`{shown(choice)}`" if code else shown(choice) for choice in key.choices)
        return f"any of {choices}" if is_list(key.kind) else choices
    limits = re.sub(r"at least (\S+), at most", r"\1 to", ", ".join(_limits(key)))
    return f"{_kind(key.kind)}{f', {limits}' if limits else ''}{', or null' if _is_optional(key) else ''}"


def _kind(kind: Any) -> str:
    if is_list(kind):
        (item,) = typing.get_args(kind)
        return "list" if item is Any else "list of mappings" if is_section(item) else "list of texts"
    options = [option for option in typing.get_args(kind) if option is not NoneType]
    if typing.get_origin(kind) is dict:
        return _KINDS[dict]
    if len(options) > 1:
        return "text or number"
    return _KINDS[options[0] if options else kind]


def _is_optional(key: Key) -> bool:
    return NoneType in typing.get_args(key.kind)


def _limits(key: Key) -> Iterator[str]:
    for limit in key.limits:
        if isinstance(limit, Ge):
            yield f"at least {_number(limit.ge)}"
        elif isinstance(limit, Gt):
            yield f"above {_number(limit.gt)}"
        elif isinstance(limit, Lt):
            yield f"below {_number(limit.lt)}"
        elif isinstance(limit, Le) and limit.le not in (MOST_COUNT, MOST_SECONDS):
            yield f"at most {_number(limit.le)}"
        elif isinstance(limit, AfterValidator) and limit.func is positive_or_off:
            yield "positive, or -1 for none"


def _number(bound: Any) -> str:
    return {2**63 - 1: "2^63 - 1", -(2**63): "-2^63", 2**50: "2^50", 2.0**32: "2^32"}.get(bound, f"{bound:.10g}")


def _default(key: Key) -> str:
    return "*required*" if key.default == MISSING else f"`{shown(key.default)}`"
