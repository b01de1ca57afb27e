"""The config as flat values: all keys, or only those that make the numbers of a run."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from rlinf_lite.config.fields import Section
from rlinf_lite.config.schema import keys, section_of_items


def flatten(config: Section, *, neutral_keys: bool = True) -> dict[str, Any]:
    """The config as ``{"runner.max_steps": 60, ...}``; the items of a list of sections are dicts like this one.

    Args:
        neutral_keys: False leaves only the keys that make the numbers of a run.
    """
    found = {key: value_of(config, key) for key, spec in keys(type(config)).items() if neutral_keys or not spec.neutral}
    for key in found:
        if section_of_items(keys(type(config))[key].kind):
            found[key] = [flatten(item, neutral_keys=neutral_keys) for item in found[key]]
    return found


def value_of(config: Section, key: str) -> Any:
    """The value of a dotted key."""
    node: Any = config
    for name in key.split("."):
        node = getattr(node, name)
    return node


def to_yaml(config: Section) -> str:
    """The config as YAML that can be run again."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump()))
