"""The whole config, and a list of its keys with everything that the schema says about each."""

from __future__ import annotations

import functools
import operator
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from pydantic import Field
from pydantic.fields import FieldInfo

from rlinf_lite.config.actor import ActorConfig
from rlinf_lite.config.algorithm import AlgorithmConfig
from rlinf_lite.config.cluster import ClusterConfig
from rlinf_lite.config.critic import CriticConfig
from rlinf_lite.config.data import DataConfig
from rlinf_lite.config.fields import NEUTRAL, Section
from rlinf_lite.config.reward import RewardConfig
from rlinf_lite.config.rollout import RolloutConfig
from rlinf_lite.config.runner import RunnerConfig


class Config(Section):
    """Every key of a run."""

    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    runner: RunnerConfig = Field(default_factory=RunnerConfig)
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    actor: ActorConfig = Field(default_factory=ActorConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    critic: CriticConfig = Field(default_factory=CriticConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """What the schema says about one key."""

    kind: Any
    """The plain type, without limits and with the type of the choices for a ``Literal``: ``int``, ``str | None``,
    ``list[str]`` ..."""
    choices: tuple[Any, ...]
    """The only values it takes, null included; empty if others are fine too."""
    limits: tuple[Any, ...]
    """What stands beside the type in ``Annotated``: `annotated_types`, validators."""
    default: Any
    """An OmegaConf interpolation follows another key; ``MISSING`` must be set."""
    neutral: bool
    """Whether it cannot change the numbers of a run."""
    description: str


@functools.cache
def keys(root: type[Section] = Config) -> dict[str, Key]:
    """Every key that holds a value, by dotted name: ``{"runner.max_steps": Key(...), ...}``."""
    return {name: _key(field) for name, field in _walk(root, "") if not is_section(field.annotation)}


@functools.cache
def sections(root: type[Section] = Config) -> dict[str, type[Section]]:
    """Every section, by dotted name: ``{"runner": RunnerConfig, "runner.logger": LoggerConfig, ...}``."""
    return {name: field.annotation for name, field in _walk(root, "") if is_section(field.annotation)}


def known_keys(root: type[Section] = Config) -> list[str]:
    """The dotted names of all keys and sections, in the order of the schema."""
    return [name for name, _ in _walk(root, "")]


def is_section(annotation: Any) -> typing.TypeGuard[type[Section]]:
    """Whether a field's type is a section of keys."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def section_of_items(kind: Any) -> type[Section] | None:
    """The section that each item of a plain type is, if it is a list of sections; else None."""
    items = typing.get_args(kind)
    return items[0] if is_list(kind) and is_section(items[0]) else None


def is_text(kind: Any) -> bool:
    """Whether a plain type takes only text, or text and null."""
    return kind is str or kind == str | None


def is_list(kind: Any) -> bool:
    """Whether a plain type is a list."""
    return typing.get_origin(kind) is list


def _walk(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field
        if is_section(field.annotation):
            yield from _walk(field.annotation, f"{prefix}{name}.")


def _key(field: FieldInfo) -> Key:
    parts = [*field.metadata, *_annotations(field.annotation)]
    default = field.get_default(call_default_factory=True)
    choices = _choices(field.annotation)
    return Key(
        kind=_plain(field.annotation),
        choices=(*choices, None) if choices and _is_optional(field.annotation) else choices,
        limits=tuple(part for part in parts if part is not NEUTRAL),
        default=default,
        neutral=NEUTRAL in parts,
        description=" ".join((field.description or "").split()),
    )


def _plain(annotation: Any) -> Any:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _plain(inner[0])
    if origin is Literal:
        return type(inner[0])
    if origin in (Union, types.UnionType):
        return functools.reduce(operator.or_, map(_plain, inner))
    return list[_plain(inner[0])] if origin is list else annotation  # type: ignore[misc]


def _is_optional(annotation: Any) -> bool:
    return types.NoneType in typing.get_args(_plain(annotation))


def _choices(annotation: Any) -> tuple[Any, ...]:
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return inner
    return next((found for part in inner if (found := _choices(part))), ())


def _annotations(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) is Annotated:
        yield from annotation.__metadata__
    for part in typing.get_args(annotation):
        yield from _annotations(part)
