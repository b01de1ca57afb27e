"""Whether the engine's log-probs are those of the policy, bit for bit, and where old log-probs come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlinf_lite import numerics
from rlinf_lite.config import Config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_MULTIPLE = 16
"""Of a head's size, or the rows of an attention's product may decide how MKL rounds it; on a GPU of all sizes."""
_SMALLEST = 16
"""Hidden size on a CPU: with fewer some log-probs differ."""
_LARGEST_HEAD = 256
"""That FlashAttention-2 takes, see `models.flash.fits`."""
_HEADS = ("head_dim", "v_head_dim", "global_head_dim", "qk_nope_head_dim", "qk_rope_head_dim")
_SIZES = ("hidden_size", "intermediate_size", "moe_intermediate_size", "n_inner")
"""Sizes of heads and of layers, by their names in ``config.json``. No family has them all."""
_MIXTURES = {"afmoe", "glm4_moe", "minimax_m2", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"}
"""Mixtures of experts that were measured. Others may have gates whose products round by the number of rows."""


def engine_is_exact(config: Config, device: str) -> bool:
    """Whether the log-probs that the engine reports are the bits that the policy computes with the same weights.

    The condition stands here; docs/exactness.md says why each part is needed. It holds only what was measured:
    fp32 on a CPU, bf16 with FlashAttention-2 on a GPU, and heads of ordinary sizes (on a GPU layers, too). With others
    some log-probs may differ in the last bit on a CPU.

    The driver asks for its own processor and environment: workers are taken to have the same.

    Args:
        device: ``"cpu"`` or ``"cuda"``, on which the workers compute.

    Raises:
        ConfigError: there is no model at ``actor.model.model_path``.
    """
    from rlinf_lite.models import hf_directory  # the driver starts Ray first, and then imports torch beside it

    actor, cluster, engine = config.actor, config.cluster, config.rollout
    precision = "fp32" if device == "cpu" else "bf16"
    return (
        actor.training_backend == "fsdp"  # Megatron's layers round differently
        and actor.fsdp_config.strategy == "fsdp2"
        and cluster.threads_per_worker == 1
        and cluster.deterministic
        and engine.rollout_backend == "builtin"
        and engine.model.model_path == actor.model.model_path
        and engine.model.precision == precision
        and (actor.fsdp_config.mixed_precision.param_dtype or actor.model.precision) == precision
        and not actor.model.dropout
        and _is_ordinary(hf_directory.load_config(hf_directory.resolve(actor.model.model_path), None), device)
    )


def _is_ordinary(model: PretrainedConfig, device: str) -> bool:
    from rlinf_lite.models.hf_directory import has_experts  # as above

    text = model.get_text_config()
    sizes = {name: getattr(text, name, None) for name in (*_HEADS, *_SIZES)}
    head = sizes["head_dim"] or text.hidden_size // text.num_attention_heads
    if device == "cpu":
        heads = [size for size in (head, *(sizes[name] for name in _HEADS)) if size]
        parts = (sizes["qk_nope_head_dim"] or 0) + (sizes["qk_rope_head_dim"] or 0)
        # MKL computes attention and experts, oneDNN all other layers.
        longest = max([*heads, parts, *(sizes[name] or 0 for name in _SIZES if has_experts(text))])
        return (
            (not has_experts(text) or text.model_type in _MIXTURES)
            and text.hidden_size >= _SMALLEST
            and all(size % _MULTIPLE == 0 for size in heads)
            and numerics.rows_are_independent(longest)
        )
    fits_flash = head <= _LARGEST_HEAD and not getattr(text, "attn_logit_softcapping", None)
    return fits_flash and all(size % _MULTIPLE == 0 for size in (head, *sizes.values()) if size)


def old_from_engine(config: Config, device: str) -> bool:
    """Whether the engine's log-probs are taken as the old ones, instead of a pass of the policy before the update.

    They are with ``algorithm.recompute_logprobs: false``; else where that saves a pass and changes no bit. Then the
    forward pass of the first mini-batch, whose weights are the engine's, is what ``policy/rollout_logprob_gap``
    compares them with. Two choices ask for the pass itself: ``importance_sampling_fix``, which corrects for a
    difference, and an algorithm of the user, which need not measure one.
    """
    algorithm = config.algorithm
    if not algorithm.recompute_logprobs:
        return True
    has_pass = algorithm.n_minibatches > 1 or algorithm.kl_in_reward
    wants_pass = algorithm.importance_sampling_fix or algorithm.path is not None
    return has_pass and not wants_pass and engine_is_exact(config, device)


def about_megatron(config: Config) -> str | None:
    """A line for the log about what the Megatron backend does not promise; None with another one."""
    if config.actor.training_backend != "megatron":
        return None
    megatron = config.actor.megatron
    size = megatron.tensor_model_parallel_size
    sequence = ""
    if megatron.sequence_parallel:
        sequence = " and sequence parallelism" if size > 1 else " (so sequence_parallel has no effect)"
    old = "actor" if config.algorithm.recompute_logprobs else "engine"
    return (
        f"   Megatron-core, tensor parallelism {size}{sequence}: the engine's log-probs are close to the actor's, "
        f"not bitwise identical (docs/megatron.md); old log-probs are the {old}'s"
    )
