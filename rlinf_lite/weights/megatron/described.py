"""What Megatron's arguments say of a model beside its shapes: lengths, norms and rotary embeddings, by Megatron-LM's
names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def described(config: PretrainedConfig) -> dict[str, Any]:
    """Arguments with which Megatron-LM computes what the model computes (``--use-checkpoint-args`` takes most of them).

    YaRN's have these names from core 0.18 on. Two numbers of transformers' have none: YaRN's ``attention_factor``, and
    what ``llama3`` scales other than Llama 3.1 does (factors 1 and 4, 8192 positions).
    """
    rope: dict[str, Any] = config.rope_parameters or {}
    base = rope.get("rope_theta", 10000.0)
    return {
        "max_position_embeddings": config.max_position_embeddings,
        "norm_epsilon": config.rms_norm_eps,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "position_embedding_type": "rope",
        "rotary_base": int(base) if base == int(base) else base,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        **_scaled(rope),
    }


def _scaled(rope: dict[str, Any]) -> dict[str, Any]:
    kind, factor = rope.get("rope_type", "default"), rope.get("factor")
    if kind == "linear":
        return {"rotary_seq_len_interpolation_factor": factor}
    if kind == "llama3":
        return {"use_rope_scaling": True, "rope_scaling_factor": factor}
    if kind != "yarn":
        return {}
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    return {
        "position_embedding_type": "yarn",
        "rotary_scaling_factor": factor,
        "yarn_original_max_position_embeddings": rope["original_max_position_embeddings"],
        "yarn_beta_fast": rope.get("beta_fast") or 32.0,
        "yarn_beta_slow": rope.get("beta_slow") or 1.0,
        "yarn_correction_range_round_to_int": rope.get("truncate", True),
        "mscale": mscale if mscale and all_dim else 1.0,
        "mscale_all_dim": all_dim if mscale and all_dim else 0.0,
    }
