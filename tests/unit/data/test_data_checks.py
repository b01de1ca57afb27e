"""Contradictions between ``data.*`` and ``reward.*`` are refused."""

from __future__ import annotations

import pytest
import yaml

from rlinf_lite.config import ConfigError, build
from rlinf_lite.config.rules import check

START = {"runner": {"experiment_name": "x"}, "actor": {"model": {"model_path": "m"}}}
MATH = "{type: math, train_data_paths: [a.jsonl]}"


def problems(text: str) -> str:
    try:
        check(build({**START, **yaml.safe_load(text)}))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "text",
    [
        f"data: {MATH}",
        f"{{data: {MATH}, reward: {{reward_type: custom, path: 'a:b'}}}}",
        "data: {type: math, train_data_paths: [a], answer_key: null}\nreward: {reward_type: custom, path: 'a:b'}",
        "data: {type: math, train_data_paths: [a], few_shot: [{question: 1, answer: 3}], metadata_keys: [level]}",
        "data: {type: math, train_data_paths: [a], apply_chat_template: true, chat_template_kwargs: {think: false}}",
        "data: {type: arithmetic, apply_chat_template: true}\nreward: {reward_type: exact}",
        "data: {type: reasoning_gym, reasoning_gym: {task: gcd}}\nreward: {reward_type: reasoning_gym}",
        "data: {type: reasoning_gym, reasoning_gym: {task: gcd}}\nreward: {reward_type: custom, path: a.py:b}",
    ],
)
def test_valid_combinations(text):
    assert problems(text) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{{data: {MATH}, reward: {{reward_type: custom}}}}", "set reward.path=my_pkg.my_reward:score"),
        (f"{{data: {MATH}, reward: {{path: 'a:b'}}}}", "reward.path=a:b: reward.reward_type=math calls no function"),
        (f"{{data: {MATH}, reward: {{answer_format: hash}}}}", "reward.answer_format"),
        (
            f"{{data: {MATH}, reward: {{reward_type: exact, answer_format: boxed}}}}",
            "reward.reward_type=exact looks for no final answer",
        ),
        (f"{{data: {MATH}, reward: {{reward_type: reasoning_gym}}}}", "does not know data.type=math"),
        (
            "data: {type: reasoning_gym, reasoning_gym: {task: gcd}}",
            "reward.reward_type=math: cannot grade",
        ),
        ("data: {type: reasoning_gym}\nreward: {reward_type: reasoning_gym}", "data.reasoning_gym.task=null: no task"),
        ("data: {type: reasoning_gym, train_data_paths: [a]}", "items are generated, files are not read"),
        ("data: {reasoning_gym: {config: {size: 3}}}", "'size' is a key of its own; set data.reasoning_gym.size"),
        ("data: {reasoning_gym: {size: 0}}", "data.reasoning_gym.size=0: must be at least 1"),
        ("data: {prompt_template: 'Think!'}", "data.prompt_template=Think!: no place for the question"),
        (
            "data: {arithmetic: {question: 'What is {a}?'}}",
            "question=What is {a}?: no place for the numbers",
        ),
        ("data: {few_shot: [{question: 1+2}]}", "example 1 is {'question': '1+2'}; write {question: ..., answer: ...}"),
        (
            "data: {few_shot: [{question: 1, answer: 2, why: 3}]}",
            ": example 1 is {'question': 1,",
        ),
        ("data: {few_shot: ['1+2=3']}", "data.few_shot=['1+2=3']: example 1 is '1+2=3'"),
        ("data: {chat_template_kwargs: {think: false}}", "set data.apply_chat_template=true, or remove it"),
        ("data: {apply_chat_template: true, chat_template_kwargs: {tokenize: true}}", "'tokenize' is decided here"),
        ("data: {answer_key: null}", "reward.reward_type=math compares with answers"),
        ("data: {type: arithmetic, metadata_keys: [a]}", "data.type=arithmetic has no rows of files"),
        ("data: {type: poetry}", "data.type=poetry"),
    ],
)
def test_invalid_combinations_are_refused_with_a_remedy(text, message):
    assert message in problems(text)
