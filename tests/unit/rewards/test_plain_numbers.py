"""Plain numbers are parsed and compared exactly."""

from fractions import Fraction

import pytest

from rlinf_lite.rewards.plain_numbers import PlainNumber, parse_number, same_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72", 72),
        ("072", 72),
        (" -5 ", -5),
        ("\u22125", -5),
        ("+3", 3),
        ("- 4", -4),
        ("72.", 72),
        (".5", Fraction(1, 2)),
        ("0.10", Fraction(1, 10)),
        ("1,234", 1234),
        ("1,234,567.89", Fraction(123456789, 100)),
        ("1{,}000", 1000),
        (r"1\,000", 1000),
        ("$18", 18),
        (r"\$18.50", Fraction(37, 2)),
        ("$18$", 18),
        ("-$3", -3),
        ("3/4", Fraction(3, 4)),
        ("1.5e3", 1500),
        ("1e-05", Fraction(1, 100_000)),
        (r"1.5 \times 10^{-3}", Fraction(3, 2000)),
        (r"-\frac{5}{4}", Fraction(-5, 4)),
        (r"(1+\frac{1}{4})", Fraction(5, 4)),
        ("-6 / 8", Fraction(-3, 4)),
        ("9007199254740993", 9007199254740993),  # 2**53 + 1: a float would lose the 1
    ],
)
def test_numbers(text, value):
    assert parse_number(text) == PlainNumber(Fraction(value), False)


@pytest.mark.parametrize("text", ["12%", r"12\%", "12 %"])
def test_percentages(text):
    assert parse_number(text) == PlainNumber(Fraction(12), True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "-",
        "%",
        "1,2",
        "12,34",
        "1,0000",
        "1 2",
        "5x",
        "1/0",
        "1/2/3",
        "1e99999",
        "x=5",
        "5 cm",
        "٣",
        r"\frac12",
    ],
)
def test_anything_else_is_not_a_plain_number(text):
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("0.5", "1/2", True),
        ("1/3", "2/6", True),
        ("1/3", "0.333333", False),
        ("50%", "50", True),
        ("50%", "0.5", True),
        ("0.5", "50%", True),
        ("50%", "0.5%", False),
        ("50", "0.5", False),
        ("9007199254740993", "9007199254740992", False),
    ],
)
def test_same_number(a, b, same):
    first, second = parse_number(a), parse_number(b)
    assert first is not None and second is not None
    assert same_number(first, second) is same
