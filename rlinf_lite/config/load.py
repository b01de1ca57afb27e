"""From what YAML and overrides have set to a checked `Config`, or to one message with every problem."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rlinf_lite.config import micro_batches, rlinf, rules
from rlinf_lite.config.evaluation import EvalConfig
from rlinf_lite.config.fields import Section
from rlinf_lite.config.schema import Config, Key, is_section, keys, known_keys, section_of_items, sections
from rlinf_lite.config.suggestions import nearest
from rlinf_lite.config.written import problems_of, shown, typed
from rlinf_lite.errors import ConfigError

S = TypeVar("S", bound=Section)
_LIMITS = {
    "greater_than_equal": "at least",
    "greater_than": "above",
    "less_than": "below",
    "less_than_equal": "at most",
}
"""pydantic's names of limits, in our words."""


def build(raw: Mapping[str, Any] | DictConfig, note: rlinf.Note = rlinf.silent) -> Config:
    """A run's config: keys and types checked, interpolations resolved, limits and choices checked.

    Whether the keys fit together is left to `rules.check`.

    Args:
        note: is called with a line for each value that is accepted and has no effect.

    Raises:
        ConfigError: every problem, one line each: unknown keys (with the nearest known one), wrong types, missing
            values, broken interpolations, limits. If limits are the only problem: also what `rules.check` would find.
    """
    values, problems = read(raw, Config, note)
    config, misfits = validate(values, Config)
    if misfits and not problems:
        misfits += rules.problems(_unchecked(Config, nested(values)))
    if config is None or problems:
        raise ConfigError("\n".join([*problems, *misfits]))
    return config


def build_evaluation(raw: Mapping[str, Any] | DictConfig) -> EvalConfig:
    """An evaluation's config, checked like a run's by `build` and `rules.check`.

    Raises:
        ConfigError: every problem, one line each.
    """
    values, problems = read(raw, EvalConfig)
    config, misfits = validate(values, EvalConfig)
    if config is None or problems:
        raise ConfigError("\n".join([*problems, *misfits]))
    if found := rules.evaluation_problems(config):
        raise ConfigError("\n".join(found))
    return config


def read(
    raw: Mapping[str, Any] | DictConfig, root: type[Section], note: rlinf.Note = rlinf.silent
) -> tuple[dict[str, Any], list[str]]:
    """The value of each key, typed and resolved.

    Args:
        raw: nested, as YAML and overrides have set it.
        root: the schema.
        note: as for `build`.

    Returns:
        The values by dotted key, without those that have a problem; and the problems, one line each.
    """
    given = DictConfig(OmegaConf.to_container(raw) if isinstance(raw, DictConfig) else dict(raw))
    foreign, problems = rlinf.take(given, _defaults(root), note) if root is Config else (OmegaConf.create({}), [])
    problems += _drop_unknown(given, "", root)
    refused = set()
    for key, node in rlinf.nodes_of(given, keys(root)).items():
        if lines := _convert(node, key, keys(root)[key]):
            problems += lines
            refused.add(key)
    merged = OmegaConf.merge(_defaults(root), foreign, given)
    unresolved: Any = OmegaConf.to_container(merged)
    values: dict[str, Any] = {}
    for key, spec in keys(root).items():
        try:
            value = functools.reduce(operator.getitem, key.split("."), unresolved)
            if not _is_plain(value):
                value = _resolved(merged, key)
        except InterpolationToMissingValueError:
            continue  # the key that it leads to is missing itself, and is named
        except MissingMandatoryValue as error:
            if key not in refused:
                full_key = error.full_key or key
                problems.append(f"{full_key}: no value given; set it in the YAML or as {full_key}=...")
        except OmegaConfBaseException as error:
            problems.append(f"{key}: {str(error).splitlines()[0]}")
        else:
            try:
                values[key] = typed(value, spec.kind)
            except ValueError as error:
                problems.append(f"{key}={shown(value)}: {error}")
                continue
            if section := section_of_items(spec.kind):
                items = [read(item, section) for item in values[key]]
                problems += [f"{key}.{index}.{line}" for index, (_, lines) in enumerate(items) for line in lines]
                values[key] = [item for item, _ in items]
    if root is Config:
        was_set = {*rlinf.nodes_of(given, keys(root)), *rlinf.nodes_of(foreign, keys(root))}
        micro_batches.complete(values, was_set.__contains__)
    return values, problems


@functools.cache
def _defaults(root: type[Section]) -> DictConfig:
    return OmegaConf.create(root().model_dump(warnings=False))


def _drop_unknown(given: DictConfig, prefix: str, root: type[Section]) -> Iterator[str]:
    """Remove what the schema does not know, in place; yield a line for each."""
    for name in list(given):
        key = f"{prefix}{name}"
        child = given._get_node(name)
        if key in sections(root) and isinstance(child, DictConfig):
            yield from _drop_unknown(child, f"{key}.", root)
            continue
        if key in keys(root):
            continue
        if key in sections(root):
            yield f"{key}: {shown(_as_written(given, name))} given where a section of keys belongs"
        else:
            yield f"{key}: unknown key{nearest(key, known_keys(root))}"
        del given[name]


def _convert(node: DictConfig, key: str, spec: Key) -> list[str]:
    """Convert what ``node`` holds for ``key`` to its type, in place; a value that does not fit is removed.

    Before interpolations are resolved, so that those that lead here get the converted value.

    Returns:
        One line per problem.
    """
    name = key.rpartition(".")[2]
    if OmegaConf.is_interpolation(node, name) or OmegaConf.is_missing(node, name):
        return []
    value = _as_written(node, name)
    if problems := problems_of(key, value, spec.kind):
        del node[name]
        return problems
    node[name] = typed(value, spec.kind)
    return []


def _is_plain(value: Any) -> bool:
    """Whether a value holds no interpolation and is not missing, so that OmegaConf need not resolve it."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return not isinstance(value, str) or ("${" not in value and value != MISSING)


def _as_written(node: DictConfig, name: Any) -> Any:
    """The value of a key with its interpolations as they are."""
    child: Any = node._get_node(name)
    return OmegaConf.to_container(child) if OmegaConf.is_config(child) else child._value()


def _resolved(merged: Any, key: str) -> Any:
    """The value of a key with its interpolations resolved."""
    section, _, name = key.rpartition(".")
    value = OmegaConf.select(merged, section)[name]
    return OmegaConf.to_container(value, resolve=True, throw_on_missing=True) if OmegaConf.is_config(value) else value


def validate(values: Mapping[str, Any], root: type[S]) -> tuple[S | None, list[str]]:
    """A config with these values, by dotted key; None if limits, choices or validators of fields refuse some.

    Returns:
        The config; and the problems, one line per key.
    """
    try:
        return root.model_validate(nested(values)), []
    except ValidationError as error:
        lines = {}
        for detail in reversed(error.errors(include_url=False)):
            key, value, spec = _located(detail["loc"], values, root)
            lines[key] = _line(key, value, detail, spec)
        return None, list(reversed(lines.values()))


def _located(location: tuple[int | str, ...], values: Mapping[str, Any], root: type[Section]) -> tuple[str, Any, Key]:
    """The dotted key that an error of pydantic is about, its value and its spec.

    The rest of the location is inside of the value: in a list of sections it leads to a key of an item.
    """
    parts = [str(part) for part in location]
    length = next(length for length in range(len(parts), 0, -1) if ".".join(parts[:length]) in keys(root))
    key, inside = ".".join(parts[:length]), location[length:]
    spec = keys(root)[key]
    section = section_of_items(spec.kind)
    if section is None:
        return key, values[key], spec
    index = int(inside[0])
    name, value, spec = _located(inside[1:], values[key][index], section)
    return f"{key}.{index}.{name}", value, spec


def _line(key: str, value: Any, detail: ErrorDetails, spec: Key) -> str:
    subject, context = f"{key}={shown(value)}", detail.get("ctx", {})
    if spec.choices:
        choices = " or ".join(shown(choice) for choice in spec.choices)
        if isinstance(value, list):
            return f"{key}: {detail['input']!r} is not known here; use {choices}"
        what = "not known here" if len(spec.choices) > 1 else "not implemented"
        return f"{subject}: {what}; use {choices}"
    if detail["type"] == "finite_number":
        return f"{subject}: must be a finite number"
    if detail["type"] in _LIMITS:
        (bound,) = context.values()
        return f"{subject}: must be {_LIMITS[detail['type']]} {bound:.10g}"
    assert detail["type"] == "value_error", detail  # `written` has converted all other values to what the fields take
    return f"{subject}: {context['error']}"


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """``{"runner.max_steps": 60}`` as ``{"runner": {"max_steps": 60}}``."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        *path, name = key.split(".")
        node = found
        for section in path:
            node = node.setdefault(section, {})
        node[name] = value
    return found


def _unchecked(section: type[S], values: Mapping[str, Any]) -> S:
    """A section with values that its limits may refuse, for the rules to look at."""
    made = dict(values)
    for name, field in section.model_fields.items():
        if is_section(field.annotation) and name in made:
            made[name] = _unchecked(field.annotation, made[name])
        elif (item := section_of_items(field.annotation)) and name in made:
            made[name] = [_unchecked(item, values) for values in made[name]]
    return section.model_construct(**made)


def _register_resolvers() -> None:
    """Arithmetic for YAML, under the names that RLinf's configs use."""
    OmegaConf.register_new_resolver("subtract", lambda a, b: a - b, replace=True)
    OmegaConf.register_new_resolver("multiply", lambda a, b: a * b, replace=True)
    OmegaConf.register_new_resolver("not", lambda a: not a, replace=True)


_register_resolvers()
