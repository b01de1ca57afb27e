"""Prompt template, few-shot examples and system prompt, as text and as a chat."""

from __future__ import annotations

import pytest

from rlinf_lite.config import ArithmeticConfig
from rlinf_lite.data import DataError

ROWS = [{"prompt": "3+4", "answer": "7"}]
SHOTS = [{"question": "1+2", "answer": "3"}, {"question": "2+2", "answer": 4}]
AROUND = {"prompt_template": "Q {prompt} = {x}?", "system_prompt": "Sum.", "few_shot": SHOTS}


def only(loaded) -> str:
    (problem,) = loaded.problems
    return problem.prompt


def test_as_text(load, jsonl):
    assert only(load(jsonl(ROWS), **AROUND)) == ("Sum.\n\nQ 1+2 = {x}? 3\n\nQ 2+2 = {x}? 4\n\nQ 3+4 = {x}?")


def test_as_text_without_a_second_space_before_an_answer(load, jsonl):
    prompt = only(load(jsonl(ROWS), prompt_template="Q: {prompt}\nA: ", few_shot=SHOTS[:1]))
    assert prompt == "Q: 1+2\nA: 3\n\nQ: 3+4\nA: "


def test_as_a_chat(load, jsonl, chat_tokenizer):
    prompt = only(load(jsonl(ROWS), tokenizer=chat_tokenizer, apply_chat_template=True, **AROUND))
    assert prompt == "s:Sum.;u:Q 1+2 = {x}?;a:3;u:Q 2+2 = {x}?;a:4;u:Q 3+4 = {x}?;a:"


def test_a_question_that_contains_the_placeholder(load, jsonl):
    rows = [{"prompt": "what is {prompt}?", "answer": "1"}]
    assert only(load(jsonl(rows), prompt_template="<{prompt}>")) == "<what is {prompt}?>"


def test_a_chat_of_the_row_keeps_its_turns(load, jsonl, chat_tokenizer):
    chat = [("system", "0"), ("user", "hi"), ("assistant", "yes"), ("user", "3+4")]
    rows = [{"prompt": [{"role": role, "content": content} for role, content in chat], "answer": "7"}]
    changes = {"few_shot": SHOTS[:1], "prompt_template": "{prompt}!"}
    prompt = only(load(jsonl(rows), tokenizer=chat_tokenizer, apply_chat_template=True, **changes))
    assert prompt == "s:0;u:1+2!;a:3;u:hi;a:yes;u:3+4!;a:"


def test_two_system_prompts(load, jsonl, chat_tokenizer):
    rows = [{"prompt": [{"role": "system", "content": "0"}, {"role": "user", "content": "1"}], "answer": "7"}]
    path = jsonl(rows)
    with pytest.raises(DataError) as caught:
        load(path, tokenizer=chat_tokenizer, apply_chat_template=True, system_prompt="1")
    assert str(caught.value) == f"{path}:1: the prompt has a system message of its own; set data.system_prompt=null"


def test_chat_template_kwargs_reach_the_template(load, jsonl, chat_tokenizer, monkeypatch):
    monkeypatch.setattr(chat_tokenizer, "chat_template", "{{ messages[0].content }}{{ enable_thinking }}")
    changes = {"apply_chat_template": True, "chat_template_kwargs": {"enable_thinking": False}}
    assert only(load(jsonl(ROWS), tokenizer=chat_tokenizer, **changes)) == "3+4False"


def test_generated_sums_as_a_chat(load, chat_tokenizer):
    sums = ArithmeticConfig(num_problems=1, num_val_problems=0, question="{a} + {b}")
    loaded = load(
        type="arithmetic", arithmetic=sums, tokenizer=chat_tokenizer, apply_chat_template=True, few_shot=SHOTS[:1]
    )
    assert (only(loaded), loaded.problems[0].answer) == ("u:1+2;a:3;u:58 + 44;a:", "102")


def test_half_a_surrogate_pair_in_an_example(load, jsonl):
    with pytest.raises(DataError, match="half a surrogate pair"):
        load(jsonl(ROWS), few_shot=[{"question": "\ud800", "answer": "1"}])


def test_examples_count_towards_the_length(load, jsonl):
    assert len(load(jsonl(ROWS), max_prompt_length=4).problems) == 1
    with pytest.raises(DataError, match="the shortest one that was counted has 10"):
        load(jsonl(ROWS), max_prompt_length=9, prompt_template="{prompt}------")
