"""The decoder of GPUs samples what the CPU's does: the same code without graphs, on a CPU."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from rlinf_lite.errors import NotFinite
from rlinf_lite.rollout import device_decoder
from rlinf_lite.rollout.device_decoder import DeviceDecoder
from rlinf_lite.rollout.forward import Forward
from rlinf_lite.rollout.host_decoder import HostDecoder
from rlinf_lite.rollout.output import Sampled

pytestmark = pytest.mark.usefixtures("one_thread")
ENDS = frozenset(range(1, 41, 8))
rng = np.random.default_rng(3)
PROMPTS = [rng.integers(3, 41, n).tolist() for n in (3, 40, 1, 9, 33, 17, 2)]


@pytest.fixture(scope="module")
def model(random_model):
    return random_model("gemma2")


def decoders(model, max_rows: int = 512, eos_ids=ENDS):
    forward = Forward(copy.deepcopy(model))
    options = {"eos_ids": eos_ids, "with_logprobs": True, "max_rows": max_rows}
    return HostDecoder(forward, **options), DeviceDecoder(forward, **options)


@torch.inference_mode()
def sample(decoder, *batches) -> list[Sampled]:
    return [decoder.decode(batch) for batch in batches]


def assert_same(one: list[Sampled], other: list[Sampled]) -> None:
    for a, b in zip(one, other, strict=True):
        assert np.array_equal(a.length_N, b.length_N) and np.array_equal(a.finished_N, b.finished_N)
        for row, length in enumerate(a.length_N.tolist()):
            assert np.array_equal(a.tokens_NT[row, :length], b.tokens_NT[row, :length])
            assert np.array_equal(a.logprobs_NT[row, :length], b.logprobs_NT[row, :length])


@pytest.mark.parametrize("max_rows", [5, pytest.param(512, marks=pytest.mark.soak)])
@pytest.mark.parametrize("options", [{}, {"do_sample": False}, {"top_k": 9, "top_p": 0.8, "repetition_penalty": 1.3}])
def test_it_samples_what_the_cpus_decoder_does(model, make_batch, max_rows, options):
    """Rows leave after 1 to 30 tokens, so the order changes, smaller steps are taken, and others join."""
    batch = make_batch(PROMPTS, group_size=3, max_new_tokens=30, temperature=0.8, **options)
    (host,), (device,) = (sample(decoder, batch) for decoder in decoders(model, max_rows))
    assert options or len(set(host.length_N.tolist())) >= 7
    assert_same([host], [device])


def test_rows_move_to_smaller_steps(model, make_batch, monkeypatch):
    taken = []
    step = device_decoder._Rows.step
    monkeypatch.setattr(device_decoder._Rows, "step", lambda rows, num, s: (taken.append(num), step(rows, num, s)))
    batch = make_batch(PROMPTS, group_size=10, max_new_tokens=40)
    host, device = decoders(model)
    assert_same(sample(host, batch), sample(device, batch))
    assert set(taken) == {80, 64, 32} and taken == sorted(taken, reverse=True)


def test_the_memory_of_a_batch_serves_the_next_ones(model, make_batch):
    """Larger ones, smaller ones, with and without a penalty, greedy ones between them."""
    batches = [
        make_batch(PROMPTS[:2], group_size=2, max_new_tokens=5),
        make_batch(PROMPTS, group_size=4, max_new_tokens=30, repetition_penalty=1.2),
        make_batch(PROMPTS[2:3], group_size=1, max_new_tokens=3, do_sample=False),
        make_batch(PROMPTS, group_size=4, max_new_tokens=30, repetition_penalty=1.5, seed=8),
        make_batch(PROMPTS, group_size=4, max_new_tokens=90, seed=9),
    ]
    host, device = decoders(model, max_rows=20)
    assert_same(sample(host, *batches), sample(device, *batches))
    assert_same(sample(device, batches[0]), sample(decoders(model)[1], batches[0]))


def test_a_response_of_one_token(model, make_batch):
    host, device = decoders(model, eos_ids=frozenset())
    batch = make_batch(PROMPTS[:1], max_new_tokens=1)
    found = sample(device, batch)
    assert_same(sample(host, batch), found)
    assert found[0].length_N.tolist() == [1] and not found[0].finished_N.any()


@pytest.mark.parametrize("options", [{}, {"do_sample": False}, {"top_p": 0.5}])
def test_logits_that_are_not_finite_end_it(model, make_batch, options):
    host, device = decoders(model)
    batch = make_batch(PROMPTS, max_new_tokens=30, **options)
    head = device._forward.head.weight
    sound = head.detach().clone()
    head.data.fill_(torch.nan)
    for decoder in (host, device):
        with pytest.raises(NotFinite):
            sample(decoder, batch)
    head.data.copy_(sound)
    assert_same(sample(host, batch), sample(device, batch))
