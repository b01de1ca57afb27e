"""pass@k against all subsets; majority votes, ties, numbers."""

from __future__ import annotations

from itertools import combinations

import pytest

from rlinf_lite.eval.estimators import Vote, maj_at_k, majority_is_correct, pass_at_k, reported_ks


def votes(*answers: str, right: str = "7") -> list[Vote]:
    return [Vote(answer=answer, correct=answer == right) for answer in answers]


@pytest.mark.parametrize(("n", "expected"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])])
def test_reported_ks(n, expected):
    assert reported_ks(n) == expected


@pytest.mark.parametrize("num_correct", range(7))
@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_fraction_of_subsets_with_a_correct_one(num_correct, k):
    subsets = list(combinations([True] * num_correct + [False] * (6 - num_correct), k))
    assert pass_at_k(6, num_correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_of_many_samples_is_finite():
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)


def test_the_most_frequent_answer_counts():
    assert majority_is_correct(votes("5", "7", "7"))
    assert not majority_is_correct(votes("7", "5", "5"))


def test_the_first_answer_wins_a_tie():
    assert majority_is_correct(votes("7", "5", "5", "7"))
    assert not majority_is_correct(votes("5", "7", "7", "5"))


def test_a_response_without_answer_does_not_vote():
    assert majority_is_correct(votes("", "", "", "7"))
    assert not majority_is_correct(votes("", ""))


def test_spellings_of_a_number_are_one_answer():
    assert majority_is_correct(votes("5", "1,000", "1000.0", right="1000.0"))
    assert not majority_is_correct(votes("x", "x", "50%", "0.5", "0.50", "x", right="0.5"))


def test_zero_is_an_answer():
    assert majority_is_correct(votes("5", "0", "0.0", right="0"))


def test_blocks():
    seven = votes("7", "7", "5", "5", "5", "7", "9")
    assert maj_at_k(seven, 1) == 3 / 7
    assert maj_at_k(seven, 2) == 1 / 3  # (7 7) (5 5) (5 7): the seventh makes no whole block
    assert maj_at_k(seven, 3) == 1 / 2
    assert maj_at_k(seven, 7) == 1.0  # three of each: 7 came first


def test_an_answer_of_too_many_digits_is_a_text():
    endless = "1" * 5000  # Python itself refuses to read it
    assert majority_is_correct(votes(endless, endless, "7", right=endless))
    assert not majority_is_correct(votes(endless, endless, "7"))
