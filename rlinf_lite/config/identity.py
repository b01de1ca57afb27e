"""The config as flat values: all keys, or only those that make the numbers of a run."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from rlinf_lite.config.fields import Section
from rlinf_lite.config.schema import keys


def flatten(config: Section, *, neutral_keys: bool = True) -> dict[str, Any]:
    """The config as ``{"runner.max_steps": 60, ...}``.

    Args:
        neutral_keys: False leaves only the keys that make the numbers of a run.
    """
    return {key: value_of(config, key) for key, spec in keys(type(config)).items() if neutral_keys or not spec.neutral}


def value_of(config: Section, key: str) -> Any:
    """The value of a dotted key."""
    node: Any = config
    for name in key.split("."):
        node = getattr(node, name)
    return node


def to_yaml(config: Section) -> str:
    """The config as YAML that can be run again."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump()))
