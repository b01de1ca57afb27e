"""Generates questions of a reasoning-gym task, for ``data.type: reasoning_gym``, in the verifier's child process."""

from __future__ import annotations

import difflib
import json
from contextlib import closing
from typing import Any, Literal

from rlinf_lite.config import ConfigError, ReasoningGymConfig
from rlinf_lite.data.errors import DataError
from rlinf_lite.data.questions import Question
from rlinf_lite.rewards.reasoning_gym import SUBJECT, require_installed
from rlinf_lite.rewards.verifier import Verifier, VerifierError

_SECONDS_PER_ITEM = 600.0
_KEY = "data.reasoning_gym"


def generate_questions(config: ReasoningGymConfig, split: Literal["train", "val"]) -> list[Question]:
    """The questions of a split: the first ``val_size`` items of the task are for validation, the next for training.

    Raises:
        ConfigError: reasoning-gym is not installed, has no such task, or the task refuses its config.
        DataError: an item could not be generated.
    """
    require_installed()
    with closing(Verifier(_SECONDS_PER_ITEM, SUBJECT)) as child:
        return generated_by(child, config, split)


def generated_by(child: Verifier, config: ReasoningGymConfig, split: Literal["train", "val"]) -> list[Question]:
    """As `generate_questions`, with a child process that is already running."""
    num_val, total = config.val_size, config.val_size + config.size
    parts = {"task": config.task, "seed": config.seed, "size": total, "config": config.config}
    spec = json.dumps(parts, sort_keys=True)
    _check(child, spec, config)
    indices = range(num_val) if split == "val" else range(num_val, total)
    return [_question(child, spec, config, index) for index in indices]


def _check(child: Verifier, spec: str, config: ReasoningGymConfig) -> None:
    reply = child.ask({"spec": spec, "check": True})
    if "unknown" in reply:
        near = difflib.get_close_matches(str(config.task), reply["unknown"], n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(reply['unknown'])}"
        raise ConfigError(f"{_KEY}.task={config.task}: reasoning-gym has no such task; {hint}")
    if "refused" in reply:
        raise ConfigError(f"{_KEY}.config={config.config}: {config.task} refuses it ({reply['refused']}); correct it")


def _question(child: Verifier, spec: str, config: ReasoningGymConfig, index: int) -> Question:
    name = f"reasoning_gym:{config.task}"
    try:
        item: dict[str, Any] = child.ask({"spec": spec, "index": index})
    except VerifierError as error:
        raise DataError(f"{name}:{index}: {error}; change {_KEY}.seed or config") from None
    answer = item["answer"] if isinstance(item["answer"], str) else ""
    metadata = {"spec": spec, "entry": item["entry"]}
    return Question(path=name, line=index, content=item["question"], answer=answer, metadata=metadata)
