"""The shipped GPU config as far as a CPU can prove it: its model on meta, its batch arithmetic, its memory comment."""

from __future__ import annotations

import pytest
from transformers import Qwen2Config

from rlinf_lite.cluster.placement import parse
from rlinf_lite.data.batching import arrange, micro_rows
from rlinf_lite.main_math import load
from rlinf_lite.models import build, shard
from rlinf_lite.runner.schedule import total_steps, total_updates

QWEN = Qwen2Config(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


@pytest.fixture(scope="module")
def config():
    return load(["qwen2.5-1.5b-grpo-fsdp"])


def test_model_builds_on_meta(config):
    model = build.build_on_meta(QWEN, config.actor.model.precision)
    assert all(param.is_meta for param in model.parameters())
    assert sum(param.numel() for param in model.parameters()) == 1_543_714_304
    assert len(shard.blocks(model)) == 28
    assert build.tied_names(model) == {"lm_head.weight": "model.embed_tokens.weight"}


def test_batch_arithmetic(config):
    algorithm, ranks = config.algorithm, len(parse(config.cluster.component_placement, 8).slots["actor"])
    rows = config.data.rollout_batch_size * algorithm.group_size
    minibatches = arrange(rows, 1, config)
    assert (ranks, rows, [len(m) for m in minibatches]) == (8, 1024, [256] * 4)
    micros = micro_rows(minibatches[0], [100] * rows, algorithm.training_batch_size_per_gpu, None)
    assert len(micros) == 64 and len(micros) % ranks == 0
    assert sorted(row for minibatch in minibatches for row in minibatch) == list(range(rows))
    assert rows % algorithm.logprob_forward_micro_batch_size == 0


def test_length_and_schedule(config):
    assert config.algorithm.sampling_params.max_new_tokens == 3072
    steps = total_steps(config, num_problems=106_000)
    assert steps == 5 * 106_000 // 128
    assert total_updates(config, steps) == 4 * steps
