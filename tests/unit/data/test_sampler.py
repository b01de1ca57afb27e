"""The stream of prompts is a pure function of (seed, epoch, index), in every process and from every cursor."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rlinf_lite.data import PromptStream
from rlinf_lite.types import Problem


def problems(count: int) -> tuple[Problem, ...]:
    return tuple(
        Problem(problem_id=i, prompt=f"{i}+0=", answer=str(i), prompt_ids=(i,), source=f"x:{i}") for i in range(count)
    )


def ids(stream: PromptStream, cursor: int, count: int) -> list[int]:
    return [prompt.problem.problem_id for prompt in stream.batch(cursor, count)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_each_epoch_visits_each_problem_once(count, shuffle):
    stream = PromptStream(problems(count), seed=3, shuffle=shuffle)
    for epoch in range(5):
        prompts = stream.batch(epoch * count, count)
        assert sorted(prompt.problem.problem_id for prompt in prompts) == list(range(count))
        assert {prompt.epoch for prompt in prompts} == {epoch}
        assert [prompt.prompt_index for prompt in prompts] == list(range(epoch * count, (epoch + 1) * count))


def test_without_shuffle_the_order_is_that_of_the_data():
    assert ids(PromptStream(problems(4), seed=3, shuffle=False), 2, 7) == [2, 3, 0, 1, 2, 3, 0]


def test_epochs_and_seeds_differ():
    stream = PromptStream(problems(50), seed=3, shuffle=True)
    orders = [tuple(ids(stream, epoch * 50, 50)) for epoch in range(6)]
    orders += [tuple(ids(PromptStream(problems(50), seed=seed, shuffle=True), 0, 50)) for seed in (4, 5)]
    assert len(set(orders)) == 8
    assert tuple(range(50)) not in orders


@pytest.mark.parametrize(("count", "size"), [(10, 4), (7, 3), (5, 5), (3, 8), (1, 4)])
def test_a_restart_at_any_cursor_continues_the_same_stream(count, size):
    straight = PromptStream(problems(count), seed=3, shuffle=True)
    total = 6 * count
    expected = straight.batch(0, total + size)
    for cursor in range(total):
        restarted = PromptStream(problems(count), seed=3, shuffle=True)
        assert restarted.batch(cursor, size) == expected[cursor : cursor + size]
    for cursor in reversed(range(total)):
        assert straight.batch(cursor, size) == expected[cursor : cursor + size], "what was asked before is forgotten"


def test_a_batch_across_the_boundary_drops_and_repeats_nothing():
    stream = PromptStream(problems(10), seed=3, shuffle=True)
    batches = [stream.batch(cursor, 4) for cursor in range(0, 20, 4)]
    assert [prompt.epoch for prompt in batches[2]] == [0, 0, 1, 1]
    flat = [prompt.problem.problem_id for batch in batches for prompt in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))


def test_a_batch_longer_than_two_epochs():
    stream = PromptStream(problems(3), seed=3, shuffle=True)
    flat = ids(stream, 1, 11)
    assert flat == [*ids(stream, 1, 2), *ids(stream, 3, 3), *ids(stream, 6, 3), *ids(stream, 9, 3)]


def test_epoch_of():
    stream = PromptStream(problems(5), seed=3, shuffle=True)
    assert [stream.epoch_of(cursor) for cursor in (0, 4, 5, 9, 10)] == [0, 0, 1, 1, 2]


def test_large_indices_take_no_longer():
    stream = PromptStream(problems(5), seed=3, shuffle=True)
    assert sorted(ids(stream, 5 * 10**15, 5)) == list(range(5))


def test_another_process_gives_the_same_order():
    code = (
        "from rlinf_lite.data import PromptStream; from rlinf_lite.types import Problem\n"
        "rows = [Problem(problem_id=i, prompt='', answer='', prompt_ids=(), source='') for i in range(20)]\n"
        "stream = PromptStream(rows, seed=3, shuffle=True)\n"
        "print([prompt.problem.problem_id for prompt in stream.batch(13, 25)])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(ids(PromptStream(problems(20), seed=3, shuffle=True), 13, 25))


def test_no_problems():
    with pytest.raises(ValueError, match="at least one problem"):
        PromptStream((), seed=3, shuffle=True)
