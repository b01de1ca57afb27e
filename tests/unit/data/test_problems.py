"""Loading problems: keys, chat templates, tokens, lengths, and the fingerprint."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlinf_lite.data import DataError
from rlinf_lite.data.identity import fingerprint
from rlinf_lite.data.sources import read_rows
from rlinf_lite.rewards.extraction import reference_answer
from rlinf_lite.rewards.plain_numbers import parse_number
from rlinf_lite.types import Problem

ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "10+12=", "answer": "22"}, {"prompt": "2+2=", "answer": "4"}]
GSM8K = Path(__file__).parents[4] / "shared" / "data" / "gsm8k" / "train.jsonl"


def refusal(load, *args, **changes) -> str:
    with pytest.raises(DataError) as caught:
        load(*args, **changes)
    return str(caught.value)


def test_rows_become_problems(load, jsonl, tokenizer):
    loaded = load(jsonl(ROWS))
    assert [(p.problem_id, p.prompt, p.answer, p.source) for p in loaded.problems] == [
        (0, "1+1=", "2", "train.jsonl:1"),
        (1, "10+12=", "22", "train.jsonl:2"),
        (2, "2+2=", "4", "train.jsonl:3"),
    ]
    assert loaded.problems[0].prompt_ids == tuple(tokenizer.convert_tokens_to_ids(["<bos>", "1", "+", "1", "="]))
    assert (loaded.num_filtered, loaded.source) == (0, "train.jsonl")


def test_other_keys_and_the_val_split(load, jsonl):
    path = jsonl([{"q": "1+1=", "a": "2"}], "val.jsonl")
    loaded = load(path, split="val", prompt_key="q", answer_key="a")
    assert (loaded.problems[0].prompt, loaded.problems[0].answer) == ("1+1=", "2")


@pytest.mark.parametrize(("key", "config_key"), [("question", "prompt_key"), ("label", "answer_key")])
def test_a_missing_key_shows_the_keys_of_the_row(load, jsonl, key, config_key):
    path = jsonl([ROWS[0], ROWS[1]])
    message = refusal(load, path, **{config_key: key})
    assert message == f"{path}:1: no key {key!r}; the row has prompt, answer; set data.{config_key}=..."


@pytest.mark.parametrize(
    ("answer", "text"), [(72, "72"), (-1, "-1"), (1.5, "1.5"), ("#### 72", "#### 72"), (["72"], "72")]
)
def test_numbers_are_accepted_as_answers(load, jsonl, answer, text):
    assert load(jsonl([{"prompt": "1", "answer": answer}])).problems[0].answer == text


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (None, "null"),
        (["72", "73"], "list"),
        (True, "bool"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        ("", "empty"),
        (" \n", "empty"),
        ([], "list"),
        ({}, "dict"),
    ],
)
def test_other_values_are_refused_as_answers(load, jsonl, answer, kind):
    path = jsonl([ROWS[0], {"prompt": "1", "answer": answer}])
    message = refusal(load, path)
    reason = f"the answer 'answer' is {kind}, not text or a number; write it as text, or set data.answer_key=..."
    assert message == f"{path}:2: {reason}"


def test_a_prompt_that_is_not_text(load, jsonl, chat_tokenizer):
    path = jsonl([{"prompt": 5, "answer": "1"}])
    assert refusal(load, path) == f"{path}:1: the prompt is int, not text; set data.prompt_key=..."
    message = refusal(load, path, tokenizer=chat_tokenizer, apply_chat_template=True)
    assert message == f"{path}:1: the prompt is int, not text; set data.prompt_key=..."


def test_the_chat_template_wraps_text_and_lists(load, jsonl, chat_tokenizer, tokenizer):
    chat = [{"role": "system", "content": "0", "name": None}, {"role": "user", "content": "1+1="}]
    path = jsonl([{"prompt": "1+1=", "answer": "2"}, {"prompt": chat, "answer": "2"}])
    loaded = load(path, tokenizer=chat_tokenizer, apply_chat_template=True)
    assert [problem.prompt for problem in loaded.problems] == ["u:1+1=;a:", "s:0;u:1+1=;a:"]
    assert loaded.problems[0].prompt_ids[0] != tokenizer.bos_token_id, "the template alone adds special tokens"
    assert len(loaded.problems[0].prompt_ids) == len("u:1+1=;a:")


def test_chat_lists_from_parquet(load, tmp_path, chat_tokenizer):
    path = tmp_path / "chat.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": [{"role": "user", "content": "1+1="}], "answer": 2}]), path)
    loaded = load(str(path), tokenizer=chat_tokenizer, apply_chat_template=True)
    assert (loaded.problems[0].prompt, loaded.problems[0].answer) == ("u:1+1=;a:", "2")


def test_a_chat_list_without_a_template(load, jsonl):
    path = jsonl([{"prompt": [{"role": "user", "content": "1"}], "answer": "2"}])
    assert refusal(load, path) == f"{path}:1: the prompt is a list of chat messages; set data.apply_chat_template=true"


def test_a_tokenizer_without_template(load, jsonl):
    message = refusal(load, jsonl(ROWS), apply_chat_template=True)
    assert message.startswith("data.apply_chat_template=true: the tokenizer") and "set it to false" in message


def test_a_template_that_refuses(load, jsonl, chat_tokenizer, monkeypatch):
    monkeypatch.setattr(chat_tokenizer, "chat_template", "{{ raise_exception('no system role') }}")
    path = jsonl(ROWS)
    message = refusal(load, path, tokenizer=chat_tokenizer, apply_chat_template=True)
    assert message == f"{path}:1: the tokenizer's chat template refuses this prompt (no system role)"


def test_long_prompts_are_filtered_and_counted(load, jsonl):
    loaded = load(jsonl(ROWS), max_prompt_length=5)
    assert [(p.problem_id, p.prompt, p.source) for p in loaded.problems] == [
        (0, "1+1=", "train.jsonl:1"),
        (1, "2+2=", "train.jsonl:3"),
    ]
    assert loaded.num_filtered == 1


def test_long_prompts_are_an_error_when_not_filtered(load, jsonl):
    path = jsonl(ROWS)
    message = refusal(load, path, max_prompt_length=5, filter_prompt_by_length=False)
    assert message.startswith(f"{path}:2: the prompt has 7 tokens, data.max_prompt_length is 5; raise it")
    assert len(load(path, max_prompt_length=7, filter_prompt_by_length=False).problems) == 3


def test_no_problems_left(load, jsonl):
    message = refusal(load, jsonl(ROWS), max_prompt_length=4)
    assert message == (
        "train.jsonl: no problems left, all 3 prompts are longer than data.max_prompt_length=4 tokens "
        "(the shortest one that was counted has 5); raise it"
    )
    assert refusal(load, jsonl([])).startswith("train.jsonl: no rows")


@pytest.mark.parametrize("empty", ["", " ", "\r\n\t", "\u00a0\u3000"])
def test_an_empty_prompt(load, jsonl, empty):
    path = jsonl([ROWS[0], {"prompt": empty, "answer": "1"}])
    assert refusal(load, path) == f"{path}:2: the prompt is empty; remove the row or set data.prompt_key=..."


VERL = {
    "prompt": "1+1=",
    "reward_model": {"style": "rule", "ground_truth": 2},
    "extra_info": {"index": 7, "none": None},
}


def test_nested_keys(load, jsonl):
    path = jsonl([VERL])
    loaded = load(path, answer_key="reward_model.ground_truth", metadata_keys=["extra_info.index", "reward_model"])
    assert loaded.problems[0].answer == "2"
    assert loaded.problems[0].metadata == {"extra_info.index": 7, "reward_model": VERL["reward_model"]}


def test_a_key_with_a_dot_is_found_before_a_nested_one(load, jsonl):
    path = jsonl([{"prompt": "1", "a.b": "flat", "a": {"b": "nested"}}])
    assert load(path, answer_key="a.b").problems[0].answer == "flat"


@pytest.mark.parametrize("key", ["reward_model.truth", "prompt.text", "extra_info.none.x", "reward_model."])
def test_a_missing_nested_key_shows_the_keys_of_the_row(load, jsonl, key):
    path = jsonl([VERL])
    assert refusal(load, path, answer_key=key) == (
        f"{path}:1: no key {key!r}; the row has prompt, reward_model.style, reward_model.ground_truth, "
        "extra_info.index, extra_info.none; set data.answer_key=..."
    )


def test_rows_without_answers_and_missing_metadata(load, jsonl):
    path = jsonl([{"prompt": "1"}])
    assert load(path, answer_key=None).problems[0].answer == ""
    message = refusal(load, path, answer_key=None, metadata_keys=["level"])
    assert message == f"{path}:1: no key 'level'; the row has prompt; set data.metadata_keys=..."


def test_the_fingerprint_covers_the_configured_metadata_only(load, jsonl, tmp_path):
    rows = [{"prompt": "1", "answer": "2", "level": 1, "note": "x"}]
    one, two = jsonl(rows, "a.jsonl"), jsonl([{**rows[0], "level": 2}], "b.jsonl")
    three = jsonl([{**rows[0], "note": "y"}], "c.jsonl")
    plain = load(one).fingerprint
    assert load(two).fingerprint == plain
    level = load(one, metadata_keys=["level"]).fingerprint
    assert level not in (plain, load(two, metadata_keys=["level"]).fingerprint)
    assert load(three, metadata_keys=["level"]).fingerprint == level
    assert load(one, metadata_keys=["level", "note"]).fingerprint != level


def test_equal_rows_are_separate_problems(load, jsonl):
    loaded = load(jsonl([ROWS[0]] * 3))
    assert [problem.problem_id for problem in loaded.problems] == [0, 1, 2]


def test_unicode_reaches_the_model_unchanged(load, jsonl):
    texts = [
        "e\u0301 is not \u00e9",
        "\U0001f469\u200d\U0001f680 1+1",
        "\u202eabc\u202c 1",
        "\u05e9\u05dc\u05d5\u05dd",
        "a\x00b",
    ]
    loaded = load(jsonl([{"prompt": text, "answer": text} for text in texts]))
    assert [problem.prompt for problem in loaded.problems] == texts
    assert [problem.answer for problem in loaded.problems] == texts


def test_a_line_of_megabytes_is_filtered_like_any_long_prompt(load, jsonl):
    path = jsonl(
        [ROWS[0], {"prompt": "1", "answer": "2", "unused": "x" * 1_200_000}, {"prompt": "1" * 1_200_000, "answer": "3"}]
    )
    loaded = load(path)
    assert [problem.answer for problem in loaded.problems] == ["2", "2"] and loaded.num_filtered == 1


def test_half_a_surrogate_pair(load, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a\\ud800b", "answer": "1"}\n')
    assert refusal(load, str(path)).startswith(f"{path}:1: half a surrogate pair (U+D800) in the text")


def test_the_number_of_threads_changes_nothing(load, jsonl, tokenizer):
    rows = [{"prompt": f"{number}+1=", "answer": number + 1} for number in range(3000)]
    path = jsonl(rows)
    loaded = list(load(path, num_workers=0).problems)
    assert all(problem.prompt_ids == tuple(tokenizer(problem.prompt)["input_ids"]) for problem in loaded)
    assert list(load(path, num_workers=3).problems) == loaded


def test_the_fingerprint_does_not_depend_on_paths(load, jsonl):
    whole = load(jsonl(ROWS, "a.jsonl")).fingerprint
    assert len(whole) == 64
    assert load(jsonl(ROWS[:2], "b.jsonl"), jsonl(ROWS[2:], "c.jsonl")).fingerprint == whole
    assert load(jsonl(ROWS[::-1], "d.jsonl")).fingerprint != whole
    assert load(jsonl([{**ROWS[0], "answer": "3"}, *ROWS[1:]], "e.jsonl")).fingerprint != whole
    assert load(jsonl([{**ROWS[0], "prompt": "1-1="}, *ROWS[1:]], "f.jsonl")).fingerprint != whole
    assert load(jsonl(ROWS, "g.jsonl"), max_prompt_length=5).fingerprint != whole


def test_the_fingerprint_covers_the_template(load, jsonl, chat_tokenizer):
    path = jsonl(ROWS)
    assert load(path, tokenizer=chat_tokenizer, apply_chat_template=True).fingerprint != load(path).fingerprint


def test_the_fingerprint_covers_the_tokens_and_the_borders_of_fields():
    def of(prompt: str, answer: str, *prompt_ids: int) -> str:
        return fingerprint([Problem(problem_id=0, prompt=prompt, answer=answer, prompt_ids=prompt_ids, source="x")])

    assert len({of("ab", "c", 1), of("a", "bc", 1), of("ab", "c", 2), of("ab", "c", 1, 2), of("ab", "c", 12)}) == 5


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not beside the repository")
def test_gsm8k(load):
    loaded = load(str(GSM8K), prompt_key="question", max_prompt_length=2000)
    assert len(loaded.problems) + loaded.num_filtered == 7473
    assert loaded.problems[0].answer.endswith("#### 72")


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not beside the repository")
def test_every_answer_of_gsm8k_is_a_plain_number():
    """So ``reward_type: math`` grades all of them without math-verify."""
    for name in ("train.jsonl", "test.jsonl"):
        answers = [row.fields["answer"] for row in read_rows([str(GSM8K.with_name(name))], "data.train_data_paths")]
        assert [answer for answer in answers if parse_number(reference_answer(answer)) is None] == []
