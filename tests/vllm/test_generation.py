"""Responses of vLLM: greedy tokens equal to the builtin engine's, ends and lengths, sampling by counters."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from engine_process import EMBEDDED, bits, flat, load_model, make_batch, pieces, sums

from rlinf_lite.models import hf_directory, vocabulary
from rlinf_lite.rollout.builtin import BuiltinEngine

if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: bash toolkits/vllm/install_cpu.sh", allow_module_level=True)
pytestmark = pytest.mark.timeout(600)
TEXTS = ("57+38=", "12+31=", "99+99=", "10+10=", "45+23=", "88+13=")


@pytest.fixture
def loaded(engine):
    engine.load_weights(pieces(load_model()))
    return engine


@pytest.fixture(scope="module")
def builtin():
    model_dir = hf_directory.resolve(EMBEDDED)
    tokenizer = hf_directory.load_tokenizer(model_dir)
    eos_ids = vocabulary.eos_ids(model_dir, tokenizer)
    return BuiltinEngine(load_model(), tokenizer, eos_ids=eos_ids, return_logprobs=True, max_rows=64)


def compared(rollouts):
    rows = [(r.prompt_ids.tolist(), r.response_ids.tolist(), r.finished, r.text) for r in rollouts]
    return [(r.prompt_index, r.sample_index, *row) for r, row in zip(rollouts, rows, strict=True)]


@pytest.mark.parametrize("max_new_tokens", [8, 3, 1])
def test_greedy_tokens_equal_those_of_the_builtin_engine(loaded, builtin, max_new_tokens):
    """Tokens, end tokens, which responses were truncated, order and text."""
    batch = make_batch(sums(*TEXTS), do_sample=False, max_new_tokens=max_new_tokens, group_size=2)
    ours = flat(loaded.generate(batch))
    assert compared(ours) == compared(flat(builtin.generate(batch)))
    finished = {r.finished for r in ours}
    assert finished == ({False} if max_new_tokens == 1 else {True} if max_new_tokens == 8 else {True, False})
    assert all((r.response_ids[-1] == 2) == r.finished for r in ours)


def test_greedy_tokens_with_a_repetition_penalty_equal_those_of_the_builtin_engine(loaded, builtin):
    batch = make_batch(sums(*TEXTS), do_sample=False, max_new_tokens=8, repetition_penalty=1.5)
    assert compared(flat(loaded.generate(batch))) == compared(flat(builtin.generate(batch)))


def test_a_batch_gives_the_same_whatever_came_before_it(loaded):
    one = make_batch(sums(*TEXTS[:3]), group_size=8)
    other = make_batch(sums(*TEXTS[2:]), first=50, group_size=5, temperature=0.8)
    first, second = bits(flat(loaded.generate(one))), bits(flat(loaded.generate(other)))
    assert bits(flat(loaded.generate(one))) == first
    assert bits(flat(loaded.generate(other))) == second
    loaded.load_weights(pieces(load_model(seed=1)))
    assert bits(flat(loaded.generate(one))) != first
    loaded.load_weights(pieces(load_model()))
    assert bits(flat(loaded.generate(other))) == second


def test_every_counter_changes_the_tokens(loaded):
    loaded.load_weights(pieces(load_model(seed=1)))  # less certain of its answer
    batch = make_batch(sums("57+38="), group_size=32, max_new_tokens=3, temperature=2.0)
    tokens = [rollout.response_ids.tolist() for rollout in flat(loaded.generate(batch))]
    assert len({tuple(row) for row in tokens}) > 8  # of one prompt

    def first_tokens(**counters):
        other = make_batch(sums("57+38="), group_size=32, max_new_tokens=3, temperature=2.0, **counters)
        return [rollout.response_ids.tolist() for rollout in flat(loaded.generate(other))]

    assert first_tokens() == tokens
    assert all(first_tokens(**counters) != tokens for counters in ({"step": 2}, {"first": 1}, {"stream": "val"}))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_from_the_models_distribution(loaded, temperature):
    """Of 4,000 draws the fraction of each token is within five standard deviations of its probability."""
    (prompt,) = sums("57+38=")
    with torch.no_grad():
        logits = load_model()(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    expected = (logits / temperature).softmax(-1).numpy()
    batch = make_batch([prompt], group_size=4000, max_new_tokens=1, temperature=temperature)
    drawn = np.bincount([int(r.response_ids[0]) for r in flat(loaded.generate(batch))], minlength=len(expected))
    assert np.all(np.abs(drawn / 4000 - expected) < 5 * np.sqrt(expected * (1 - expected) / 4000) + 1e-3)


def test_top_k_and_top_p(loaded):
    (prompt,) = sums("57+38=")
    with torch.no_grad():
        best = load_model()(input_ids=torch.tensor([prompt])).logits[0, -1].topk(2).indices.tolist()
    two = flat(loaded.generate(make_batch([prompt], group_size=200, max_new_tokens=1, top_k=2)))
    assert {int(r.response_ids[0]) for r in two} == set(best)
    one = flat(loaded.generate(make_batch([prompt], group_size=50, max_new_tokens=1, top_p=1e-3)))
    assert {int(r.response_ids[0]) for r in one} == {best[0]}


def test_logprobs_only_where_they_are_asked_for(loaded, engines):
    assert all(r.logprobs is None for r in flat(loaded.generate(make_batch(sums("1+2="), stream="val"))))
    quiet = engines.of(return_logprobs=False)
    quiet.load_weights(pieces(load_model()))
    assert all(r.logprobs is None for r in flat(quiet.generate(make_batch(sums("1+2=")))))


def test_threads_are_those_of_the_worker(loaded):
    assert torch.get_num_threads() == 1
