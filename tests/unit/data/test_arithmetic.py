"""Generated sums are correct, distinct, held out for validation, and the same in every version."""

from __future__ import annotations

import pytest

from rlinf_lite.config import ArithmeticConfig, ConfigError
from rlinf_lite.data.arithmetic import generate_sums


def prompts(split, num_digits=2, num_problems=300, num_val_problems=100) -> list[str]:
    config = ArithmeticConfig(num_digits=num_digits, num_problems=num_problems, num_val_problems=num_val_problems)
    return [question.content for question in generate_sums(config, split)]


@pytest.mark.parametrize(("num_digits", "low", "high"), [(1, 0, 9), (2, 10, 99), (3, 100, 999), (9, 10**8, 10**9 - 1)])
def test_sums_are_right_and_of_the_right_length(num_digits, low, high):
    config = ArithmeticConfig(num_digits=num_digits, num_problems=60, num_val_problems=20)
    questions = generate_sums(config, "train") + generate_sums(config, "val")
    for question in questions:
        left, right = map(int, question.content.removesuffix("=").split("+"))
        assert low <= left <= high and low <= right <= high
        assert question.answer == str(left + right)
    assert len({question.content for question in questions}) == 80


def test_the_order_never_changes():
    assert prompts("train")[:4] == ["62+30=", "36+57=", "54+80=", "51+44="]
    assert prompts("val")[:4] == ["58+44=", "84+33=", "82+15=", "35+47="]


def test_validation_sums_do_not_depend_on_the_number_of_training_sums():
    assert prompts("val", num_problems=10) == prompts("val", num_problems=5000)
    assert prompts("train", num_problems=5000)[:10] == prompts("train", num_problems=10)


@pytest.mark.parametrize(("num_digits", "space"), [(1, 100), (2, 8100)])
def test_all_sums_can_be_used(num_digits, space):
    train = prompts("train", num_digits, space - 30, 30)
    val = prompts("val", num_digits, space - 30, 30)
    assert (len(train), len(val)) == (space - 30, 30)
    assert len({*train, *val}) == space


def test_more_sums_than_exist_are_refused_with_the_maximum():
    with pytest.raises(ConfigError) as caught:
        prompts("train", 1, 71, 30)
    assert str(caught.value) == (
        "data.arithmetic.num_problems: 71 and 30 for validation (data.arithmetic.num_val_problems) are more than the "
        "100 sums of 1-digit numbers; choose at most 70, or more digits"
    )


def test_the_question_template_does_not_change_the_sums():
    config = ArithmeticConfig(num_problems=2, num_val_problems=100, question="What is {a}+{b}?")
    assert [(q.content, q.answer) for q in generate_sums(config, "train")] == [
        ("What is 62+30?", "92"),
        ("What is 36+57?", "93"),
    ]


def test_through_load_problems(load, tokenizer):
    loaded = load(type="arithmetic", arithmetic=ArithmeticConfig(num_problems=5, num_val_problems=3))
    assert [problem.problem_id for problem in loaded.problems] == list(range(5))
    assert loaded.problems[4].source == "arithmetic:5" and loaded.source == "arithmetic"
    assert all(problem.prompt_ids[0] == tokenizer.bos_token_id for problem in loaded.problems)
    assert all(len(problem.prompt_ids) == 7 for problem in loaded.problems)
    held_out = load(type="arithmetic", split="val", arithmetic=ArithmeticConfig(num_problems=5, num_val_problems=3))
    assert len(held_out.problems) == 3 and held_out.fingerprint != loaded.fingerprint
