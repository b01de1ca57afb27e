"""Comparing answers: hostile answers take bounded time, few expressions are compared, GSM8K's answers are right."""

import json
import random
import time
from pathlib import Path

import pytest

from rlinf_lite.rewards.equivalence import MAX_EXPRESSIONS, same_answer
from rlinf_lite.rewards.extraction import final_answer, reference_answer
from rlinf_lite.rewards.normal_form import normal_form
from rlinf_lite.rewards.plain_numbers import MAX_CHARS

GSM8K = Path(__file__).parents[4] / "shared/data/gsm8k/test.jsonl"


def never(reference, found, up_to_factor):
    raise AssertionError(f"compared {reference!r} and {found!r}")


def differ(reference, found, up_to_factor):
    return False


PIECES = (
    "( [ { \\{ 1, 1;2 x< 1<x\\ or \\pm \\frac{1}{ \\sqrt( 0.3 1e9 \\text{a =1 x=1, \\cup(1,2) & \\\\ cm % A) a: "
    "² \\overline{ \\left("
)


@pytest.mark.parametrize("piece", [*PIECES.split(), "1 ", "1 000 ", "a b ", "3 cm and ", "\\begin{pmatrix}", " "])
def test_any_answer_is_compared_in_bounded_time(piece):
    started = time.process_time()
    text = piece * (MAX_CHARS // len(piece))
    for found in (text, f"1{text[:-90]}" + ")" * 80, "x" + text[:-1]):
        for reference in ("7", text[:-1], "(1, 2)", "x < 3", "1, 2"):
            same_answer(reference, found, differ)
    assert time.process_time() - started < 20  # without limits: minutes


def test_the_number_of_compared_expressions_is_limited():
    compared = []
    names = [f"x_{{{n}}}" for n in range(200)]
    assert not same_answer(", ".join(names), ", ".join(reversed(names)), lambda *pair: bool(compared.append(pair)))
    assert len(compared) <= MAX_EXPRESSIONS


@pytest.mark.parametrize(
    ("reference", "found"),
    [("1,234", "1234.0"), ("5 cm", "5"), ("2, 1", "1, 2"), ("1/2", "½"), ("B", "(B) 18"), ("50%", "0.5")],
)
def test_equivalent_without_comparing_expressions(reference, found):
    assert same_answer(reference, found, never)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        (r"\dfrac12", r"\frac{1}{2}"),
        ("½", r"\frac{1}{2}"),
        ("1 1/4", r"(1+\frac{1}{4})"),
        ("x²", "x^{2}"),
        ("1.5e3", r"1.5 \times 10^{3}"),
        (r"0.1\overline{6}", r"\frac{1}{6}"),
        (r"\left( 3,\, 4 \right)", "( 3, 4 )"),
        ("**$18$**", "18"),
        (r"\$18", "$18"),
        ("12 345", "12345"),
    ],
)
def test_normal_form(text, normal):
    assert normal_form(text) == normal


def test_every_answer_of_gsm8k_is_right_for_its_own_problem_only():
    if not GSM8K.exists():
        pytest.skip("there is no copy of GSM8K")
    answers = [json.loads(line)["answer"] for line in GSM8K.open()]
    others = random.Random(0).sample(answers, len(answers))
    value = {answer: float(answer.rsplit("####", 1)[1].replace(",", "")) for answer in answers}
    for answer, other in zip(answers, others, strict=True):
        assert same_answer(reference_answer(answer), final_answer(answer), never)
        assert same_answer(reference_answer(answer), final_answer(other), never) == (value[answer] == value[other])
