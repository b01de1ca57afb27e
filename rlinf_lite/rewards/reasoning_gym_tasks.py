"""Generates the items of a reasoning-gym task, and scores answers to them, in the verifier's child process.

Only the child imports this module, and with it reasoning-gym. Some tasks generate other items in every process unless
the hash seed of strings is fixed; the child's is.
"""

from __future__ import annotations

import base64
import functools
import json
import math
import pickle
import random
from typing import Any

import numpy as np
import reasoning_gym
from reasoning_gym.composite import DatasetSpec
from reasoning_gym.factory import DATASETS


def reply_to(request: dict[str, Any]) -> dict[str, Any]:
    """Handle one request.

    * ``{"spec", "check": true}`` -> ``{"unknown": [known tasks]}``, ``{"refused": reason}`` or ``{"length": items}``
    * ``{"spec", "index"}`` -> ``{"question", "answer", "entry"}``
    * ``{"spec", "entry", "answers"}`` -> ``{"reward": that of the best answer}``
    """
    np.random.seed(0)
    if "check" in request:
        return _check(request["spec"])
    task = _task(request["spec"])
    return _item(task, request["index"]) if "index" in request else _score(task, request["entry"], request["answers"])


def _check(spec: str) -> dict[str, Any]:
    if json.loads(spec)["task"] not in DATASETS:
        return {"unknown": sorted(DATASETS)}
    try:
        return {"length": len(_task(spec))}
    except (AssertionError, TypeError, ValueError, KeyError) as error:
        return {"refused": f"{type(error).__name__}: {error}"}


@functools.lru_cache(maxsize=4)
def _task(spec: str) -> Any:
    """The task of ``{"task", "seed", "size", "config"}``, as JSON."""
    values = json.loads(spec)
    config = values["config"]
    if values["task"] == "composite":
        config = config | {
            "datasets": [DatasetSpec(**{"weight": 1, "config": {}, **part}) for part in config.get("datasets", [])]
        }
    return reasoning_gym.create_dataset(values["task"], seed=values["seed"], size=values["size"], **config)


def _item(task: Any, index: int) -> dict[str, Any]:
    entry = task[index]
    packed = base64.b64encode(pickle.dumps(entry)).decode()  # an entry may hold objects that JSON cannot
    return {"question": entry["question"], "answer": entry["answer"], "entry": packed}


def _score(task: Any, packed: str, answers: list[str]) -> dict[str, Any]:
    entry = pickle.loads(base64.b64decode(packed))
    return {"reward": max(_reward(task, entry, answer) for answer in answers)}


def _reward(task: Any, entry: dict[str, Any], answer: str) -> float:
    random.seed(0)
    try:
        reward = float(task.score_answer(answer, entry))
    except Exception:  # several tasks raise on an answer in an unexpected form: it is wrong
        return 0.0
    return reward if math.isfinite(reward) else 0.0
