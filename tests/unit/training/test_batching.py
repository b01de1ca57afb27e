"""Responses to units of training: compared with values by hand; splits never exceed their limits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlinf_lite.training.batch import (
    RowSize,
    SplitSettings,
    StepBatch,
    StepRows,
    arrange,
    rows_by_number,
    rows_by_tokens,
)
from rlinf_lite.types import Column, Group, Problem, Prompt, Response

SETTINGS = SplitSettings(
    num_minibatches=2,
    shuffle_seed=None,
    rows_for_forward=3,
    rows_for_update=1,
    max_tokens=None,
)


def response(ids, logprobs=None, mask=None) -> Response:
    return Response(
        sample_index=0,
        token_ids=np.array(ids, dtype=np.int64),
        loss_mask=np.ones(len(ids), dtype=bool) if mask is None else np.array(mask, dtype=bool),
        logprobs=None if logprobs is None else np.array(logprobs, dtype=np.float32),
        finished=True,
        text="",
        weights_step=0,
    )


def group(prompt_ids, *responses) -> Group:
    problem = Problem(problem_id=0, prompt="?", answer="", prompt_ids=tuple(prompt_ids), source="")
    return Group(prompt=Prompt(prompt_index=0, epoch=0, problem=problem), responses=responses)


GROUPS = [
    group([1, 5, 6], response([10, 2], [-0.1, -0.2]), response([11, 12, 13, 2], [-0.3, -0.4, -0.5, -0.6])),
    group([7], response([14], [-0.7]), response([15, 16], [-0.8, -0.9])),
]
ALL = [True] * 4
ADVANTAGES = torch.tensor([1, 1, -2, -2, -2, -2, 0.5, 0.0, 0.0])
LENGTHS = np.array([2, 4, 1, 2])


def step_batch(groups=GROUPS, counted=ALL, step=1, **changes) -> StepBatch:
    return StepBatch(StepRows(groups, step=step, settings=replace(SETTINGS, **changes)), counted)


def test_a_unit_by_hand():
    """The prompt of three responses is stored once; each first token is predicted by the prompt's last."""
    (unit, rest) = step_batch().for_forward()
    assert (unit.index, unit.num_responses, rest.index, rest.num_responses) == (0, 3, 1, 1)
    assert unit.ids_N.tolist() == [1, 5, 6, 10, 2, 11, 12, 13, 2, 7, 14]
    assert unit.positions_N.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 0, 1]
    segments = unit.segments
    assert segments.start_S.tolist() == [0, 3, 5, 9, 10] and segments.stop_S.tolist() == [3, 5, 9, 10, 11]
    assert segments.parent_S.tolist() == [-1, 0, 0, -1, 3]
    assert unit.source_M.tolist() == [2, 3, 2, 5, 6, 7, 9]
    assert unit.targets_M.tolist() == [10, 2, 11, 12, 13, 2, 14]
    assert unit.seq_M.tolist() == [0, 0, 1, 1, 1, 1, 2]
    assert rest.ids_N.tolist() == [7, 15, 16] and rest.source_M.tolist() == [0, 1] and rest.seq_M.tolist() == [0, 0]
    tensors = (unit.ids_N, unit.positions_N, unit.source_M, unit.targets_M, unit.seq_M, *vars_of(segments))
    assert {tensor.dtype for tensor in tensors} == {torch.int64}


def vars_of(segments):
    return segments.start_S, segments.stop_S, segments.parent_S


def sequences(unit):
    """The tokens of each response with its prompt, and the index in the unit of each of them."""
    starts, stops, parents = (values.tolist() for values in vars_of(unit.segments))
    own = [list(range(start, stop)) for start, stop in zip(starts, stops, strict=True)]
    leaves = [segment for segment in range(len(parents)) if segment not in set(parents)]
    places = [own[parents[leaf]] + own[leaf] for leaf in leaves]
    return [unit.ids_N[row].tolist() for row in places], places


def test_sequences_by_hand():
    rows, _ = sequences(step_batch().for_forward()[0])
    assert rows == [[1, 5, 6, 10, 2], [1, 5, 6, 11, 12, 13, 2], [7, 14]]


@pytest.mark.parametrize("shuffle_seed", [None, 5])
@pytest.mark.parametrize("max_tokens", [None, 12])
def test_every_loss_token_is_predicted_where_it_stands(shuffle_seed, max_tokens):
    batch = step_batch(shuffle_seed=shuffle_seed, rows_for_update=2, max_tokens=max_tokens)
    units = [unit for mini in batch.for_update({}, np.array(ALL)) for unit in mini.units]
    for unit in (*batch.for_forward(), *units):
        rows, places = sequences(unit)
        for source, target, row in zip(*map(list, (unit.source_M, unit.targets_M, unit.seq_M)), strict=True):
            assert rows[row][places[row].index(source) + 1] == target
    assert sorted(t for unit in units for t in unit.targets_M.tolist()) == [2, 2, 10, 11, 12, 13, 14, 15, 16]


def test_an_empty_prompt_is_refused():
    with pytest.raises(AssertionError):  # nothing predicts the first token
        step_batch([group([], response([4, 2]), response([3]))], [True, True])


@pytest.mark.parametrize(
    ("sizes", "max_tokens", "expected"),
    [
        ([(0, 1, 3), (1, 1, 3), (2, 1, 3), (3, 1, 3)], 8, [[0, 1], [2, 3]]),
        ([(0, 1, 3), (1, 1, 3), (2, 1, 3), (3, 1, 3)], 15, [[0, 1], [2, 3]]),  # not three and one
        ([(0, 9, 1), (0, 9, 1), (0, 9, 1), (0, 9, 1)], 13, [[0, 1, 2, 3]]),  # their prompt counts once
        ([(0, 9, 1), (1, 9, 1), (0, 9, 1), (1, 9, 1)], 22, [[0, 1, 2, 3]]),  # also if others stand between
        ([(0, 6, 2), (0, 6, 2), (1, 2, 2)], 10, [[0, 1], [2]]),
        ([(0, 2, 7), (1, 0, 1), (2, 0, 1)], 8, [[0], [1, 2]]),  # one row alone may be longer
        ([(0, 0, 1), (1, 2, 7), (2, 0, 1)], 8, [[0], [1], [2]]),
        ([(0, 0, 3), (1, 0, 3), (2, 0, 3)], 100, [[0, 1, 2]]),
        ([(0, 0, 3), (1, 0, 3), (2, 0, 3)], 1, [[0], [1], [2]]),
        ([(0, 0, 3)], 1, [[0]]),
    ],
)
def test_units_by_tokens(sizes, max_tokens, expected):
    given = [RowSize(group, text, prompt, response) for text, (group, prompt, response) in enumerate(sizes)]
    assert rows_by_tokens(range(len(sizes)), given, max_tokens) == expected


def test_equal_responses_to_a_prompt_count_once_in_a_unit():
    same, other, to_another = RowSize(0, 7, 2, 3), RowSize(0, 8, 2, 3), RowSize(1, 7, 2, 3)
    assert rows_by_tokens(range(5), [same, other, same, same, same], 8) == [[0, 1, 2, 3, 4]]
    assert rows_by_tokens(range(3), [same, to_another, same], 9) == [[0], [1], [2]]
    assert rows_by_tokens(range(3), [same, to_another, same], 10) == [[0, 1, 2]]


def tokens_of(unit, sizes) -> int:
    prompts = {sizes[row].group: sizes[row].prompt for row in unit}
    responses = {(sizes[row].group, sizes[row].text): sizes[row].response for row in unit}
    return sum(prompts.values()) + sum(responses.values())


def largest_of_the_best_split(rows, sizes, number) -> int:
    """Of all ways to cut ``rows`` in ``number`` units."""
    ends = [(0, *cuts, len(rows)) for cuts in itertools.combinations(range(1, len(rows)), number - 1)]
    return min(max(tokens_of(rows[a:b], sizes) for a, b in itertools.pairwise(split)) for split in ends)


def test_units_by_tokens_are_few_and_of_similar_size():
    rng = np.random.default_rng(0)
    for _ in range(200):
        number = int(rng.integers(1, 9))
        prompts = rng.integers(1, 30, size=4).tolist()
        groups = rng.integers(0, 4, size=number).tolist()
        texts, lengths = rng.integers(0, 5, size=number).tolist(), rng.integers(1, 30, size=5).tolist()
        sizes = [RowSize(g, t, prompts[g], lengths[t]) for g, t in zip(groups, texts, strict=True)]
        rows = rng.permutation(number).tolist()
        units = rows_by_tokens(rows, sizes, 64)  # no row has more
        assert [row for unit in units for row in unit] == rows
        largest = max(tokens_of(unit, sizes) for unit in units)
        assert largest == largest_of_the_best_split(rows, sizes, len(units)) <= 64
        assert len(units) == 1 or largest_of_the_best_split(rows, sizes, len(units) - 1) > 64


def test_units_of_a_fixed_size():
    assert rows_by_number([4, 2, 0, 3, 1], 2) == [[4, 2], [0, 3], [1]]


def test_arrange_in_order():
    assert arrange(6, 9, num_minibatches=3, shuffle_seed=None) == [[0, 1], [2, 3], [4, 5]]


def test_arrange_shuffled_is_a_permutation_of_seed_and_step():
    first = arrange(64, 3, num_minibatches=4, shuffle_seed=7)
    assert [len(rows) for rows in first] == [16] * 4
    assert sorted(row for rows in first for row in rows) == list(range(64))
    np.random.seed(1)
    assert arrange(64, 3, num_minibatches=4, shuffle_seed=7) == first
    assert arrange(64, 4, num_minibatches=4, shuffle_seed=7) != first
    assert arrange(64, 3, num_minibatches=4, shuffle_seed=8) != first


@pytest.mark.parametrize("num_rows", [7, 2, 0])
def test_rows_that_cannot_be_split_evenly_are_refused(num_rows):
    with pytest.raises(AssertionError):
        arrange(num_rows, 1, num_minibatches=3, shuffle_seed=None)


def test_normalizers_are_of_the_whole_mini_batch():
    first, second = step_batch().for_update({}, np.array(ALL))
    assert (first.norm.num_tokens, first.norm.num_sequences) == (6, 2)
    assert (second.norm.num_tokens, second.norm.num_sequences) == (3, 2)
    assert [unit.index for unit in first.units] == [0, 1]
    assert first.norm.num_tokens == sum(len(unit.targets_M) for unit in first.units)


@pytest.mark.parametrize("shuffle_seed", [None, 3])
@pytest.mark.parametrize("max_tokens", [None, 10])
def test_columns_find_their_tokens(shuffle_seed, max_tokens):
    """Values of forward units, concatenated, are a column of the step; each update unit gets its own part."""
    batch = step_batch(shuffle_seed=shuffle_seed, rows_for_update=2, max_tokens=max_tokens)
    column = torch.cat([-unit.targets_M.float() for unit in batch.for_forward()])
    columns = {
        Column.OLD_LOGPROB: column,
        Column.REF_LOGPROB: 2 * column,
        Column.ENGINE_LOGPROB: batch.engine_logprobs(),
    }
    engine = dict(zip([10, 2, 11, 12, 13, 2.5, 14, 15, 16], batch.engine_logprobs().tolist(), strict=True))
    for mini in batch.for_update(columns, np.array(ALL)):
        for unit in mini.units:
            assert torch.equal(unit.columns[Column.OLD_LOGPROB], -unit.targets_M.float())
            assert torch.equal(unit.columns[Column.REF_LOGPROB], -2 * unit.targets_M.float())
            for token, value in zip(unit.targets_M.tolist(), unit.columns[Column.ENGINE_LOGPROB].tolist(), strict=True):
                assert token == 2 or value == engine[token]


@pytest.mark.parametrize("max_tokens", [None, 10])
@pytest.mark.parametrize("counted", [[True, False, True, True], [False, False, True, False]])
def test_responses_that_are_not_counted_stay_in_the_units_without_loss_tokens(max_tokens, counted):
    given = {"shuffle_seed": 1, "rows_for_update": 2, "max_tokens": max_tokens}
    whole, partly = step_batch(**given), step_batch(counted=counted, **given)
    assert partly.num_tokens_N.tolist() == (LENGTHS * counted).tolist()
    assert len(partly.engine_logprobs()) == (LENGTHS * counted).sum()
    for a, b in zip(whole.for_forward(), partly.for_forward(), strict=True):
        assert torch.equal(a.ids_N, b.ids_N) and a.num_responses == b.num_responses
    column = torch.cat([unit.targets_M.float() for unit in partly.for_forward()])
    minis = zip(
        whole.for_update({}, np.array(ALL)), partly.for_update({Column.RETURN: column}, np.array(ALL)), strict=True
    )
    for (rows, _), (one, other) in zip(partly._rows.minibatches, minis, strict=True):
        assert other.norm.num_sequences == sum(counted[row] for row in rows)
        assert other.norm.num_tokens == sum(len(unit.targets_M) for unit in other.units)
        for a, b in zip(one.units, other.units, strict=True):
            assert torch.equal(a.ids_N, b.ids_N)
            assert torch.equal(b.columns[Column.RETURN], b.targets_M.float())


def test_responses_that_are_counted_but_not_trained():
    batch = step_batch(rows_for_update=2)
    column = torch.cat([unit.targets_M.float() for unit in batch.for_forward()])
    trained = np.array([True, False, False, False])
    first, second = batch.for_update({Column.RETURN: column}, trained)
    assert (first.norm.num_tokens, first.norm.num_sequences, second.norm.num_tokens) == (2, 1, 0)
    assert first.units[0].targets_M.tolist() == [10, 2] == first.units[0].columns[Column.RETURN].tolist()
    assert first.units[0].num_responses == 2 and second.units[0].targets_M.tolist() == []


def test_tokens_that_the_policy_did_not_sample_are_no_loss_tokens():
    tool = group([1, 2], response([3, 4, 5, 6], [-1, -2, -3, -4], [True, False, False, True]))
    (unit,) = step_batch([tool], [True], num_minibatches=1).for_forward()
    assert unit.ids_N.tolist() == [1, 2, 3, 4, 5, 6]
    assert unit.source_M.tolist() == [1, 4] and unit.targets_M.tolist() == [3, 6]
    assert step_batch([tool], [True], num_minibatches=1).engine_logprobs().tolist() == [-1, -4]


def test_a_response_that_was_not_generated_may_have_no_tokens_and_no_logprobs():
    failed = [group([1, 5, 6, 7, 8, 9, 3], response([]), GROUPS[0].responses[1]), GROUPS[1]]
    batch = step_batch(failed, [False, True, True, True], num_minibatches=1, rows_for_update=2)
    unit = batch.for_update({}, np.array(ALL))[0].units[0]
    assert unit.seq_M.tolist() == [1, 1, 1, 1] and unit.num_responses == 2
    assert sequences(unit)[0] == [[1, 5, 6, 7, 8, 9, 3], [1, 5, 6, 7, 8, 9, 3, 11, 12, 13, 2]]


def test_what_is_not_finite_does_not_get_into_the_units():
    broken = [group([1, 5, 6], response([10, 2], [np.nan, -np.inf]), GROUPS[0].responses[1]), GROUPS[1]]
    batch = step_batch(broken, [False, True, True, True])
    assert batch.engine_logprobs().isfinite().all()


def test_a_unit_of_nothing_but_failures():
    failed = [group([4], response([]), response([]))]
    (unit,) = step_batch(failed, [False, False], num_minibatches=1).for_forward()
    assert sequences(unit)[0] == [[4]] and len(unit.source_M) == 0 and unit.num_responses == 2


def test_equal_responses_to_a_prompt_are_one_segment():
    """Not those to another prompt; each keeps its own loss tokens and columns."""
    partly = response([8, 2], [-5, -6], [True, False])
    groups = [
        group([1, 5], response([8, 2], [-1, -2]), response([9, 2], [-3, -4]), partly),
        group([6], response([8, 2], [-7, -8])),
    ]
    batch = step_batch(groups, num_minibatches=1, rows_for_forward=4, rows_for_update=4)
    columns = {Column.ENGINE_LOGPROB: batch.engine_logprobs()}
    for unit in (*batch.for_forward(), *batch.for_update(columns, np.array(ALL))[0].units):
        assert unit.ids_N.tolist() == [1, 5, 8, 2, 9, 2, 6, 8, 2]
        assert unit.segments.parent_S.tolist() == [-1, 0, 0, -1, 3] and unit.num_responses == 4
        assert unit.source_M.tolist() == [1, 2, 1, 4, 1, 6, 7] and unit.targets_M.tolist() == [8, 2, 9, 2, 8, 8, 2]
        assert unit.seq_M.tolist() == [0, 0, 1, 1, 2, 3, 3]
    assert unit.columns[Column.ENGINE_LOGPROB].tolist() == [-1, -2, -3, -4, -5, -7, -8]
