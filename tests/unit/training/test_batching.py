"""Rollouts to micro-batches: compared with values by hand; splits never exceed their limits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rlinf_lite.config import AlgorithmConfig, RolloutConfig, RunnerConfig
from rlinf_lite.data.batching import Batching, StepBatch, arrange, collate, micro_rows
from rlinf_lite.types import Rollout

PAD = 99


def rollout(prompt, response, logprobs=None):
    return Rollout(
        prompt_index=0,
        sample_index=0,
        prompt_ids=np.array(prompt, dtype=np.int64),
        response_ids=np.array(response, dtype=np.int64),
        logprobs=None if logprobs is None else np.array(logprobs, dtype=np.float32),
        finished=True,
        text="",
    )


ROLLOUTS = [
    rollout([1, 5, 6], [10, 2], [-0.1, -0.2]),
    rollout([1, 5], [11, 12, 13, 2], [-0.3, -0.4, -0.5, -0.6]),
    rollout([1, 5, 6, 7], [14], [-0.7]),
    rollout([1], [15, 16], [-0.8, -0.9]),
]
ADVANTAGES = torch.tensor([1.0, -2.0, 0.5, 0.0])
# Column t speaks of token t + 1.
MASK = {
    0: [0, 0, 1, 1, 0],
    1: [0, 1, 1, 1, 1],
    2: [0, 0, 0, 1, 0],
    3: [1, 1, 0, 0, 0],
}


def test_collate_by_hand():
    micro = collate(3, [1, 0, 2], ROLLOUTS, ADVANTAGES, PAD, with_rollout=True)
    assert micro.index == 3 and micro.min_prompt_len == 2
    assert micro.input_ids_BT.tolist() == [[1, 5, 11, 12, 13, 2], [1, 5, 6, 10, 2, PAD], [1, 5, 6, 7, 14, PAD]]
    assert micro.input_ids_BT.dtype == torch.int64
    assert micro.loss_mask_BT.tolist() == [MASK[1], MASK[0], MASK[2]]
    assert micro.advantages_BT.tolist() == [[0, -2, -2, -2, -2], [0, 0, 1, 1, 0], [0, 0, 0, 0.5, 0]]
    expected = torch.tensor([[0, -0.3, -0.4, -0.5, -0.6], [0, 0, -0.1, -0.2, 0], [0, 0, 0, -0.7, 0]])
    assert torch.equal(micro.rollout_logprobs_BT, expected)
    assert {t.dtype for t in (micro.loss_mask_BT, micro.advantages_BT, micro.rollout_logprobs_BT)} == {torch.float32}
    assert micro.old_logprobs_BT is None and micro.ref_logprobs_BT is None
    for row, r in enumerate([ROLLOUTS[1], ROLLOUTS[0], ROLLOUTS[2]]):
        predicted = micro.input_ids_BT[row, 1:][micro.loss_mask_BT[row] > 0]
        assert predicted.tolist() == r.response_ids.tolist()


def test_without_rollout_logprobs():
    assert (
        collate(0, [3], [*ROLLOUTS[:3], rollout([1], [2])], ADVANTAGES, PAD, with_rollout=False).rollout_logprobs_BT
        is None
    )


def test_an_empty_prompt_is_refused():
    with pytest.raises(AssertionError):  # its mask would start at column -1, which is the last one
        collate(0, [0], [rollout([], [4, 2])], ADVANTAGES, PAD, with_rollout=False)


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "expected"),
    [
        ([4, 4, 4, 4], 8, [[0, 1], [2, 3]]),
        ([4, 4, 4, 4], 9, [[0, 1], [2, 3]]),
        ([2, 5, 2, 2], 8, [[0], [1], [2, 3]]),  # 2 x 5 is over 8: padding counts
        ([2, 4, 2, 2], 8, [[0, 1], [2, 3]]),
        ([9, 1, 1], 8, [[0], [1, 2]]),  # one row alone may be longer
        ([1, 9, 1], 8, [[0], [1], [2]]),
        ([3, 3, 3], 100, [[0, 1, 2]]),
        ([3, 3, 3], 1, [[0], [1], [2]]),
    ],
)
def test_dynamic_cuts(lengths, max_tokens, expected):
    assert micro_rows(range(len(lengths)), lengths, 1, max_tokens) == expected


def test_dynamic_cuts_keep_order_and_maximum():
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths = rng.integers(1, 40, size=int(rng.integers(1, 30))).tolist()
        rows = rng.permutation(len(lengths)).tolist()
        cuts = micro_rows(rows, lengths, 8, 64)
        assert [row for cut in cuts for row in cut] == rows
        assert all(len(cut) == 1 or len(cut) * max(lengths[row] for row in cut) <= 64 for cut in cuts)


def test_cuts_of_a_fixed_size():
    assert micro_rows([4, 2, 0, 3, 1], [1] * 5, 2, None) == [[4, 2], [0, 3], [1]]


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
def test_rows_that_cannot_be_cut_evenly_are_refused(num_rows):
    with pytest.raises(AssertionError):
        arrange(num_rows, 1, num_minibatches=3, shuffle_seed=None)


BATCHING = Batching(
    num_minibatches=2, shuffle_seed=None, rows_for_logprobs=3, rows_for_update=1, max_tokens=None, with_rollout=True
)


def step_batch(left_out=(), rollouts=ROLLOUTS, **changes) -> StepBatch:
    batching = replace(BATCHING, **changes)
    return StepBatch(rollouts, ADVANTAGES, step=1, pad_id=PAD, batching=batching, left_out=left_out)


def test_batching_is_what_the_config_asks_for():
    algorithm = AlgorithmConfig(n_minibatches=2, training_batch_size_per_gpu=1, logprob_forward_micro_batch_size=3)
    runner, rollout = RunnerConfig(max_tokens_per_mbs=9), RolloutConfig(return_logprobs=True)
    assert Batching.of(algorithm, runner, rollout, seed=5) == BATCHING
    shuffled = algorithm.model_copy(update={"shuffle_rollout": True})
    assert Batching.of(shuffled, runner, rollout, seed=5) == replace(BATCHING, shuffle_seed=5)
    dynamic = runner.model_copy(update={"enable_dynamic_batch_size": True})
    assert Batching.of(algorithm, dynamic, rollout, seed=5) == replace(BATCHING, max_tokens=9)
    silent = rollout.model_copy(update={"return_logprobs": False})
    assert Batching.of(algorithm, runner, silent, seed=5) == replace(BATCHING, with_rollout=False)


def test_for_logprobs_cuts_the_whole_batch_in_order():
    cuts, micros = step_batch(shuffle_seed=5).for_logprobs()
    assert cuts == [[0, 1, 2], [3]]
    assert [micro.index for micro in micros] == [0, 1]
    assert micros[1].input_ids_BT.tolist() == [[1, 15, 16]]


def test_for_update_counts_over_the_whole_mini_batch():
    first, second = step_batch().for_update({})
    assert (first.num_tokens, first.num_sequences) == (6, 2)
    assert (second.num_tokens, second.num_sequences) == (3, 2)
    assert [micro.index for micro in first.micro_batches] == [0, 1]
    assert first.num_tokens == sum(int(micro.loss_mask_BT.sum()) for micro in first.micro_batches)
    assert second.micro_batches[0].input_ids_BT.tolist() == [[1, 5, 6, 7, 14]]
    assert first.micro_batches[0].old_logprobs_BT is None


@pytest.mark.parametrize("shuffle_seed", [None, 5])
@pytest.mark.parametrize("max_tokens", [None, 10])
def test_logprobs_find_their_way_back(shuffle_seed, max_tokens):
    """Columns of one cut -> a row's response -> the columns of another cut."""
    batch = step_batch(shuffle_seed=shuffle_seed, rows_for_update=2, max_tokens=max_tokens)
    cuts, micros = batch.for_logprobs()
    # A log-prob that names its token and its column, garbage outside the response.
    found = {
        m.index: torch.where(m.loss_mask_BT > 0, -m.input_ids_BT[:, 1:].float(), torch.full_like(m.loss_mask_BT, 77.0))
        for m in micros
    }
    by_row = batch.by_row(cuts, found)
    assert [row.tolist() for row in by_row] == [(-r.response_ids.astype(float)).tolist() for r in ROLLOUTS]
    assert all(row.dtype == np.float32 for row in by_row)
    for mini in batch.for_update({"old_logprobs_BT": by_row, "ref_logprobs_BT": [row * 2 for row in by_row]}):
        for micro in mini.micro_batches:
            expected = -micro.input_ids_BT[:, 1:].float() * micro.loss_mask_BT
            assert torch.equal(micro.old_logprobs_BT, expected)
            assert torch.equal(micro.ref_logprobs_BT, 2 * expected)
            assert torch.equal(micro.rollout_logprobs_BT != 0, micro.loss_mask_BT > 0)


@pytest.mark.parametrize("max_tokens", [None, 10])
def test_rows_left_out_stay_in_the_batch_without_loss_tokens(max_tokens):
    """Row 1 is left out: tokens and cuts are those of the whole batch, the counts are not."""
    given = {"shuffle_seed": 5, "rows_for_update": 2, "max_tokens": max_tokens}
    whole, partly = step_batch(**given), step_batch(left_out={1}, **given)
    cuts, micros = whole.for_logprobs()
    part_cuts, part_micros = partly.for_logprobs()
    assert part_cuts == cuts
    assert all(torch.equal(a.input_ids_BT, b.input_ids_BT) for a, b in zip(micros, part_micros, strict=True))
    found = {m.index: torch.full_like(m.loss_mask_BT, -2.0) for m in part_micros}
    by_row = partly.by_row(part_cuts, found)
    assert [len(row) for row in by_row] == [2, 0, 1, 2]
    logprobs = {"old_logprobs_BT": by_row, "ref_logprobs_BT": by_row}
    num_tokens = []
    for one, other, rows in zip(whole.for_update({}), partly.for_update(logprobs), partly.minibatch_rows, strict=True):
        assert other.num_sequences == len(set(rows) - {1})
        assert other.num_tokens == sum(int(micro.loss_mask_BT.sum()) for micro in other.micro_batches)
        num_tokens.append(other.num_tokens)
        in_order = iter(rows)
        for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
            assert torch.equal(a.input_ids_BT, b.input_ids_BT) and a.min_prompt_len == b.min_prompt_len
            for i, row in zip(range(len(b.input_ids_BT)), in_order, strict=False):
                for name in ("loss_mask_BT", "advantages_BT", "rollout_logprobs_BT"):
                    expected = torch.zeros_like(getattr(a, name)[i]) if row == 1 else getattr(a, name)[i]
                    assert torch.equal(getattr(b, name)[i], expected)
                assert torch.equal(b.old_logprobs_BT[i] != 0, b.loss_mask_BT[i] > 0)
    assert sum(num_tokens) == 5


def test_a_response_that_was_not_generated_may_have_no_tokens_and_no_logprobs():
    failed = rollout([1, 5, 6, 7, 8, 9, 3], [])  # the longest prompt: it alone makes the width
    batch = step_batch(left_out={0}, rollouts=[failed, *ROLLOUTS[1:]], num_minibatches=1, rows_for_update=2)
    cuts, micros = batch.for_logprobs()
    by_row = batch.by_row(cuts, {m.index: torch.zeros_like(m.loss_mask_BT) for m in micros})
    (mini,) = batch.for_update({"old_logprobs_BT": [None, *by_row[1:]]})
    first = mini.micro_batches[0]
    assert first.input_ids_BT.tolist() == [[1, 5, 6, 7, 8, 9, 3], [1, 5, 11, 12, 13, 2, PAD]]
    assert not first.loss_mask_BT[0].any() and not first.rollout_logprobs_BT[0].any()
    with pytest.raises(AssertionError):
        step_batch(rollouts=[failed, *ROLLOUTS[1:]]).for_update({})


def test_what_is_not_finite_does_not_get_into_the_batch():
    broken = rollout([1, 5, 6], [10, 2], [np.nan, -np.inf])
    batch = step_batch(left_out={0}, rollouts=[broken, *ROLLOUTS[1:]])
    nan = np.full(2, np.nan, dtype=np.float32)
    rows = [nan, *(np.zeros(len(r.response_ids), dtype=np.float32) for r in ROLLOUTS[1:])]
    for mini in batch.for_update({"old_logprobs_BT": rows}):
        for micro in mini.micro_batches:
            assert micro.rollout_logprobs_BT.isfinite().all() and micro.old_logprobs_BT.isfinite().all()


def test_a_mini_batch_of_rows_left_out_counts_nothing():
    first, second = step_batch(left_out={0, 1}).for_update({})
    assert (first.num_tokens, first.num_sequences) == (0, 0)
    assert (second.num_tokens, second.num_sequences) == (3, 2)
    assert len(first.micro_batches) == 2
