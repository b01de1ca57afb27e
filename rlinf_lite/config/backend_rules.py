"""What does not fit together around ``actor.training_backend`` and ``fsdp_config.strategy``."""

from __future__ import annotations

from collections.abc import Iterator

from rlinf_lite.config.identity import value_of
from rlinf_lite.config.schema import Config, keys
from rlinf_lite.config.written import shown

_OF_MEGATRON = (
    "tensor_model_parallel_size",
    "sequence_parallel",
    "recompute_granularity",
    "recompute_num_layers",
    "transformer_impl",
    "make_vocab_size_divisible_by",
    "loss_scale",
    "loss_scale_window",
)
_IN_BOTH = ("tensor_model_parallel_size", "sequence_parallel", "recompute_granularity")
"""Keys of ``actor.model`` that ``actor.megatron`` follows, and whose two values might differ."""
_INSTEAD = {
    "gradient_checkpointing": "actor.megatron.recompute_granularity=full does the same",
    "mixed_precision.param_dtype": "actor.model.precision is what Megatron computes in",
}


_ONLY_FSDP2 = ("cpu_offload", "reshard_after_forward", "grad_scaler.enabled")
"""Keys of ``fsdp_config`` that FSDP1 leaves as they are."""


def strategy_problems(config: Config, section: str) -> Iterator[str]:
    """What ``strategy=fsdp`` of ``section`` (actor or critic) has no form of, one line each."""
    prefix = f"{section}.fsdp_config"
    if value_of(config, f"{prefix}.strategy") != "fsdp":
        return
    for key in (f"{prefix}.{name}" for name in _ONLY_FSDP2):
        value, unused = value_of(config, key), keys()[key].default
        if value != unused:
            yield f"{key}={shown(value)}: is for {prefix}.strategy=fsdp2; set it to {shown(unused)}, or that to fsdp2"


def backend_problems(config: Config) -> Iterator[str]:
    """One line each."""
    if config.actor.training_backend == "megatron":
        yield from _megatron(config)
        return
    for key in _OF_MEGATRON:
        value, unused = value_of(config, f"actor.megatron.{key}"), _default(f"actor.megatron.{key}")
        if value != unused:
            yield (
                f"actor.megatron.{key}={shown(value)}: is for Megatron only; set it to {shown(unused)}, or set "
                "actor.training_backend=megatron"
            )


def _megatron(config: Config) -> Iterator[str]:
    actor = config.actor
    for name in ("loss_scale", "loss_scale_window"):
        value, unused = value_of(config, key := f"actor.megatron.{name}"), _default(f"actor.megatron.{name}")
        if value != unused and actor.model.precision != "fp16":
            yield (
                f"{key}={shown(value)}: is for actor.model.precision=fp16; set it to {shown(unused)} (also as RLinf's "
                f"actor.optim.{name})"
            )
    if actor.megatron.transformer_impl == "transformer_engine" and config.cluster.device == "cpu":
        yield (
            "actor.megatron.transformer_impl=transformer_engine: Transformer Engine computes on GPUs only, and "
            "cluster.device=cpu; set it to local"
        )
    if actor.megatron.transformer_impl == "transformer_engine" and actor.megatron.sequence_parallel:
        yield (
            "actor.megatron.transformer_impl=transformer_engine: sequence_parallel=true is for Megatron-core's own "
            "layers; set one of them to false or local"
        )
    if actor.model.dropout:
        yield "actor.model.dropout=true: the Megatron backend has no dropout; set it to false"
    if (layers := actor.megatron.recompute_num_layers) is not None and actor.megatron.recompute_granularity is None:
        yield (
            f"actor.megatron.recompute_num_layers={layers}: no layer is recomputed; set it to null, or "
            "actor.megatron.recompute_granularity=full"
        )
    if config.critic.use_critic_model:
        yield (
            "critic.use_critic_model=true: the Megatron backend trains no critic; set actor.training_backend=fsdp, or "
            "an algorithm.adv_type without a critic, such as grpo"
        )
    if config.cluster.elastic and actor.megatron.tensor_model_parallel_size > 1:
        yield (
            "cluster.elastic=true: without one rank of a tensor-parallel group the others have only a part of the "
            "model; set it to false, or actor.megatron.tensor_model_parallel_size=1"
        )
    for name in _IN_BOTH:
        one, other = value_of(config, f"actor.model.{name}"), value_of(config, f"actor.megatron.{name}")
        if one not in (other, _default(f"actor.model.{name}")):
            yield (
                f"actor.model.{name}={shown(one)}: actor.megatron.{name}={shown(other)} is the same setting; "
                "write one of them"
            )
    for key in [key for key in keys() if key.startswith("actor.fsdp_config.")]:
        value, unused = value_of(config, key), _default(key)
        if value != unused:
            instead = _INSTEAD.get(key.removeprefix("actor.fsdp_config."), "it has no effect with Megatron")
            yield f"{key}={shown(value)}: is for actor.training_backend=fsdp; set it to {shown(unused)}: {instead}"


def _default(key: str) -> object:
    """Of a key, or of the one that it follows."""
    default = keys()[key].default
    followed = default.removeprefix("${").removesuffix("}") if isinstance(default, str) else ""
    return keys()[followed].default if followed in keys() else default
