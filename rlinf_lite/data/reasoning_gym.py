"""Items of a reasoning-gym task, for ``data.type: reasoning_gym``: made by the verifier's child process."""

from __future__ import annotations

import difflib
import json
from contextlib import closing
from typing import Any, Literal

from rlinf_lite.config import ConfigError, ReasoningGymConfig
from rlinf_lite.data.errors import DataError
from rlinf_lite.data.questions import Question
from rlinf_lite.rewards.reasoning_gym import SUBJECT, require
from rlinf_lite.rewards.verifier import Verifier, VerifierError

_ITEM_SECONDS = 600.0
_KEY = "data.reasoning_gym"


def items(config: ReasoningGymConfig, split: Literal["train", "val"]) -> list[Question]:
    """The items of one split: 0 to ``val_size`` are held out, the next ``size`` are to train on.

    Raises:
        ConfigError: reasoning-gym is missing, has no such task, or the task refuses its config.
        DataError: an item could not be made.
    """
    require()
    with closing(Verifier(_ITEM_SECONDS, SUBJECT)) as child:
        return made_by(child, config, split)


def made_by(child: Verifier, config: ReasoningGymConfig, split: Literal["train", "val"]) -> list[Question]:
    """As `items`, by a child that is there."""
    held_out, total = config.val_size, config.val_size + config.size
    parts = {"task": config.task, "seed": config.seed, "size": total, "config": config.config}
    spec = json.dumps(parts, sort_keys=True)
    _check(child, spec, config)
    numbers = range(held_out) if split == "val" else range(held_out, total)
    return [_question(child, spec, config, number) for number in numbers]


def _check(child: Verifier, spec: str, config: ReasoningGymConfig) -> None:
    reply = child.ask({"spec": spec, "check": True})
    if "unknown" in reply:
        near = difflib.get_close_matches(str(config.task), reply["unknown"], n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(reply['unknown'])}"
        raise ConfigError(f"{_KEY}.task={config.task}: reasoning-gym has no such task; {hint}")
    if "refused" in reply:
        raise ConfigError(f"{_KEY}.config={config.config}: {config.task} refuses it ({reply['refused']}); correct it")


def _question(child: Verifier, spec: str, config: ReasoningGymConfig, number: int) -> Question:
    name = f"reasoning_gym:{config.task}"
    try:
        made: dict[str, Any] = child.ask({"spec": spec, "index": number})
    except VerifierError as error:
        raise DataError(f"{name}:{number}: {error}; change {_KEY}.seed or config") from None
    answer = made["answer"] if isinstance(made["answer"], str) else ""
    metadata = {"spec": spec, "entry": made["entry"]}
    return Question(path=name, line=number, content=made["question"], answer=answer, metadata=metadata)
