"""The driver's records in a checkpoint, checked field by field when they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from rlinf_lite.checkpoint.manifest import CONVERTED_FROM, LACKS_RNG, SAVE_ID, WRITTEN_BY
from rlinf_lite.checkpoint.retention import METRICS
from rlinf_lite.config import Config
from rlinf_lite.observability.hub import HubState
from rlinf_lite.runner.progress import Progress

BEGAN_AFTER = "began_after"
"""Of a manifest's info: the step that the run's rows begin after; not 0 after a start from another run's checkpoint."""

_LONGEST_ID = 128


def records_of(data: Mapping[str, Any]) -> tuple[Progress, HubState]:
    """The counters, and the state of the metrics' sinks, in ``data.pt``.

    Raises:
        ValueError: names the field, and what it holds.
    """
    if absent := sorted({"progress", "observability"} - data.keys()):
        raise ValueError(f"holds no {absent[0]}; it was written by another version")
    progress = Progress.from_state(data["progress"])
    hub = data["observability"]
    if not isinstance(hub, dict) or "wandb_run_id" not in hub:
        raise ValueError(f"observability={_short(hub)}: a dict with wandb_run_id was expected")
    run_id, last_step = hub["wandb_run_id"], hub.get("last_step", progress.logged_step)
    if run_id is not None and not (isinstance(run_id, str) and run_id.isprintable() and 0 < len(run_id) <= _LONGEST_ID):
        raise ValueError(f"observability.wandb_run_id={_short(run_id)}: a short text, or None, was expected")
    if type(last_step) is not int or last_step < -1:
        raise ValueError(f"observability.last_step={_short(last_step)}: a whole number was expected")
    return progress, cast(HubState, hub)


def check_info(info: Mapping[str, Any]) -> None:
    """What a manifest says of its run; each part may be absent.

    Raises:
        ValueError: names the part, and what it holds.
    """
    for key, (is_right, expected) in _INFO.items():
        if key in info and not is_right(info[key]):
            raise ValueError(f"info.{key}={_short(info[key])}: {expected} was expected")


def model_paths(config: Config) -> dict[str, str]:
    """Where the trained models come from, for a manifest's info: the converters look there for config and tokenizer."""
    critic = {"critic_model_path": config.critic.model.model_path} if config.critic.use_critic_model else {}
    return {"model_path": config.actor.model.model_path, **critic}


def _is_dict_of(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(type(part) in kinds for part in value.values())


_INFO: dict[str, tuple[Callable[[Any], bool], str]] = {
    "identity": (lambda value: isinstance(value, dict), "a dict of settings"),
    "compute": (lambda value: isinstance(value, str), "a text"),
    SAVE_ID: (lambda value: isinstance(value, str), "a text"),
    WRITTEN_BY: (lambda value: isinstance(value, str) and value.isprintable(), "a text"),
    CONVERTED_FROM: (lambda value: isinstance(value, str), "a text"),
    LACKS_RNG: (lambda value: type(value) is bool, "true or false"),
    "model_path": (lambda value: isinstance(value, str), "a text"),
    "critic_model_path": (lambda value: isinstance(value, str), "a text"),
    "tied": (_is_dict_of(str), "a dict of names"),
    BEGAN_AFTER: (lambda value: type(value) is int and value >= 0, "a whole number from 0 on"),
    METRICS: (_is_dict_of(float, int), "a dict of numbers"),
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
