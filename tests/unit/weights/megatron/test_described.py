"""The arguments in a checkpoint make megatron-core's rotary embeddings compute transformers' frequencies."""

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from rlinf_lite.models.build import build_on_meta
from rlinf_lite.weights.megatron.described import described

EMBEDDINGS = "megatron.core.models.common.embeddings"
pytestmark = pytest.mark.xdist_group("megatron")  # it takes seconds to import

SIZES = {
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def of_transformers(kind, rope):
    config = kind(**SIZES, max_position_embeddings=131072, rope_parameters={"rope_theta": 1e6, **rope})
    embedding = build_on_meta(config, "fp32").base_model.rotary_emb
    return described(config), embedding.inv_freq, embedding.attention_scaling


@pytest.mark.parametrize(
    "rope", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}, LLAMA3], ids=["default", "linear", "3"]
)
def test_rope(rope):
    rotary = pytest.importorskip(EMBEDDINGS)
    args, frequencies, scale = of_transformers(LlamaConfig, rope)
    assert (args["position_embedding_type"], args["max_position_embeddings"], scale) == ("rope", 131072, 1.0)
    built = rotary.RotaryEmbedding(
        kv_channels=32,
        rotary_percent=args["rotary_percent"],
        rotary_interleaved=args["rotary_interleaved"],
        rotary_base=args["rotary_base"],
        rope_scaling=args.get("use_rope_scaling", False),
        rope_scaling_factor=args.get("rope_scaling_factor", 8.0),
        use_cpu_initialization=True,
    )
    theirs = built.inv_freq / args.get("rotary_seq_len_interpolation_factor", 1.0)
    torch.testing.assert_close(theirs.cpu(), frequencies, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "more",
    [{}, {"mscale": 0.7, "mscale_all_dim": 1.2}, {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}],
    ids=["qwen2.5", "mscale", "betas"],
)
def test_yarn(monkeypatch, more):
    yarn = pytest.importorskip(f"{EMBEDDINGS}.yarn_rotary_pos_embedding")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))  # where it moves frequencies
    args, frequencies, scale = of_transformers(Qwen2Config, YARN | more)
    assert args["position_embedding_type"] == "yarn"
    built = yarn.YarnRotaryEmbedding(
        kv_channels=32,
        rotary_percent=args["rotary_percent"],
        rotary_base=args["rotary_base"],
        scaling_factor=args["rotary_scaling_factor"],
        original_max_position_embeddings=args["yarn_original_max_position_embeddings"],
        beta_fast=args["yarn_beta_fast"],
        beta_slow=args["yarn_beta_slow"],
        mscale=args["mscale"],
        mscale_all_dim=args["mscale_all_dim"],
        correction_range_round_to_int=args["yarn_correction_range_round_to_int"],
        use_cpu_initialization=True,
    )
    angles, theirs = built.get_emb(2)
    torch.testing.assert_close(angles[1, 0, 0, :16].cpu(), frequencies, rtol=1e-5, atol=0)
    assert theirs == pytest.approx(scale, rel=1e-12)
