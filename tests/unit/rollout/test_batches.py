"""Generation batches: whole groups, split by config alone; results joined in canonical order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rlinf_lite.config import RolloutConfig
from rlinf_lite.rollout.batches import generation_batches, grouped, join, rows_per_batch
from rlinf_lite.types import GenerationBatch, Problem, Prompt, Response, Sampling

SAMPLING = Sampling(do_sample=True, temperature=1.0, top_k=-1, top_p=1.0, repetition_penalty=1.0, max_new_tokens=4)


def prompts(count, first=100):
    problem = Problem(problem_id=0, prompt="1+1=", answer="2", prompt_ids=(1, 3), source="made:1")
    return [Prompt(prompt_index=first + i, epoch=0, problem=problem) for i in range(count)]


def response(sample_index):
    none = np.zeros(1, dtype=np.int64)
    return Response(
        sample_index=sample_index,
        token_ids=none,
        loss_mask=none == 0,
        logprobs=None,
        finished=True,
        text="",
        weights_step=0,
    )


@pytest.mark.parametrize(
    ("group_size", "max_rows", "expected"),
    [(4, 8, [2, 2, 1]), (4, 11, [2, 2, 1]), (4, 3, [1] * 5), (1, 64, [5]), (5, 25, [5]), (2, 6, [3, 2])],
)
def test_whole_groups_within_the_limit(group_size, max_rows, expected):
    given = prompts(5)
    batches = generation_batches(
        given, stream="val", step=7, group_size=group_size, sampling=SAMPLING, seed=3, max_rows=max_rows
    )
    assert [len(batch.prompts) for batch in batches] == expected
    assert [prompt for batch in batches for prompt in batch.prompts] == given
    assert [batch.index for batch in batches] == list(range(len(batches)))
    assert {(c.stream, c.step, c.group_size, c.sampling, c.seed) for c in batches} == {
        ("val", 7, group_size, SAMPLING, 3)
    }


@pytest.mark.parametrize(
    ("backend", "workers", "expected"),
    [("builtin", 1, 64), ("builtin", 2, 40), ("builtin", 5, 16), ("vllm", 1, 16), ("vllm", 5, 16)],
)
def test_a_builtin_engine_gets_its_share_and_vllm_what_the_config_says(backend, workers, expected):
    rollout = RolloutConfig(rollout_backend=backend, max_running_requests=16)
    assert rows_per_batch(rollout, num_prompts=20, group_size=4, num_workers=workers) == expected


def test_no_prompts():
    assert generation_batches([], stream="train", step=1, group_size=2, sampling=SAMPLING, seed=0, max_rows=8) == []


def test_join_is_canonical_whatever_the_order_of_arrival():
    given = prompts(5)
    batches = generation_batches(given, stream="train", step=1, group_size=2, sampling=SAMPLING, seed=0, max_rows=4)
    results = [grouped(batch, [response(s) for _ in batch.prompts for s in range(2)]) for batch in batches]
    for arrived in itertools.permutations(results):
        groups = join(arrived)
        assert [group.prompt for group in groups] == given
        assert all([r.sample_index for r in group.responses] == [0, 1] for group in groups)


def test_the_weights_that_sample_a_response_are_known_by_their_step():
    """A training step samples with the weights before it, a validation with those after it."""
    given = {"prompts": tuple(prompts(1)), "index": 0, "group_size": 1, "sampling": SAMPLING, "seed": 0, "step": 7}
    assert GenerationBatch(stream="train", **given).weights_step == 6
    assert GenerationBatch(stream="val", **given).weights_step == 7
