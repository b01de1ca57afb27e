"""Extracting the final answer of a response."""

import time

import pytest

from rlinf_lite.rewards.extraction import final_answer, reference_answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"First \boxed{1}, then \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}} and 3 more", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{x = \boxed{5} + 1}", "5"),
        (r"\boxed{\left\{ 1, 2 \right.}", r"\left\{ 1, 2 \right."),
        (r"\boxed 7$", "7"),
        (r"\boxed { 7 }", "7"),
        (r"\boxed{5}, or \boxed{7", "5"),
        (r"cut off: \boxed{7", ""),
        (r"\boxed{}", ""),
        (r"}}} {{ \boxed{5}", "5"),
        ("\\boxed{5}\n#### 6\nThe answer is 7. 8", "7"),
        ("#### 6\nThe answer is 7.\n\\boxed{5}", "5"),
        (r"Write it in \boxed{}. The answer is \boxed{5} (not in \boxed{...}).", "5"),
        (r"<think>\boxed{4}</think> \boxed{5} <think>\boxed{6}", "5"),
        (r"\boxed{1} or $\boxed{2}$", "1, 2"),
        (r"\fbox{\frac{1}{2}}", r"\frac{1}{2}"),
    ],
)
def test_boxes(response, answer):
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("2 + 3 = 5\n#### 72", "72"),
        ("#### 1\n#### 1,234\nthe answer is 9", "9"),
        ("the answer is 9\n#### 1\n#### 1,234", "1,234"),
        ("#### 18 eggs", "18"),
        ("#### **73**", "73"),
        ("#### 72, in total", "72"),
        ("#### 9 * 8 = 72", "72"),
        ("#### 2. Add the tip\nIt is 42", "42"),
        ("#### $18 \n", "$18"),
        ("####72", "72"),
        ("#### Step 2: add\nThe answer is 9.", "9"),
    ],
)
def test_hashes(response, answer):
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The answer is 72.", "72"),
        ("the ANSWER is: 72 dollars, for 3 days", "72"),
        ("The answer is **72**", "72"),
        ("Answer: -3/4", "-3/4"),
        ("The answer is not 5, the answer is 6.", "6"),
        ("The answer is $18, not $20.", "$18"),
        ("The answer is $\\frac{1}{2}$. Check: 3", r"\frac{1}{2}"),
        (r"The answer is \(x + 1\), since 4 > 3", "x + 1"),
        ("The answer is 2x + 1. Done in 5 steps", "2x + 1"),
        ("The answer is 2.5. Done", "2.5"),
        ("The answer is 1,234.50!", "1,234.50"),
        ("The answer is 50%.", "50%"),
    ],
)
def test_answer_is(response, answer):
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("16 - 3 - 4 = 9", "9"),
        ("16-3", "16-3"),
        ("16-3=<<16-3=13>>13 eggs", "13"),
        ("It is $2^{10}$.", "2^{10}"),
        ("at (3, 4)", "(3, 4)"),
        ("12 cm^2", "12"),
        ("1.5e3 m", "1.5e3 m"),
        ("so x=-4", "-4"),
        ("costs $1,234.50.", "$1,234.50"),
        ("either 1/2 or 3/4 of it", "1/2 or 3/4"),
        ("5, 6, 7", "5, 6, 7"),
        ("about 20% of it", "20%"),
        ("", ""),
        ("no idea 😀", ""),
    ],
)
def test_last_number(response, answer):
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("16 - 3 = <<16-3=13>>13 eggs.\n#### 13", "13"),
        ("#### 1,450", "1,450"),
        (r"Thus $x = \boxed{\frac12}$.", r"\frac12"),
        ("$x + 1$", "x + 1"),
        (r"\(x + 1\)", "x + 1"),
        ("$18", "$18"),
        (" 95 ", "95"),
        ("Paris", "Paris"),
        ("x^2 - 3", "x^2 - 3"),
    ],
)
def test_references(answer, reference):
    assert reference_answer(answer) == reference


@pytest.mark.parametrize(
    ("answer_format", "answer"), [("auto", "8"), ("boxed", "6"), ("hashes", "7"), ("last_number", "9")]
)
def test_strict_formats(answer_format, answer):
    response = "\\boxed{6}\n#### 7\nThe answer is 8\nI made 9 of them."
    assert final_answer(response, answer_format) == answer
    assert final_answer("only words", answer_format) == ""


@pytest.mark.parametrize(
    "piece",
    ["answer to ", "answer ", "answer\n", "#### 1\n", "<think>", "<answer>", "$1$ ", "1 (", "**", "\\boxed{1} and "],
)
def test_long_texts_take_linear_time(piece):
    started = time.process_time()
    final_answer(piece * (400_000 // len(piece)))
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "piece", ["\\boxed{", "{", "}", "\\", "answer is ", "the answer", "#### ", "#", "$", "9", "9,", "1/", "- ", " "]
)
def test_searches_take_linear_time(piece):
    started = time.process_time()
    final_answer(piece * (400_000 // len(piece)))
    assert time.process_time() - started < 5  # quadratic: minutes
