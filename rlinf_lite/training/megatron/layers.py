"""The layers of Megatron-core's GPTModel: its own or Transformer Engine's, with the attention of models/attention.py.

Their parameters have the same names and shapes either way: norms stay modules of their own, where Megatron's spec for
Transformer Engine fuses them with the linear layer that follows.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

import torch
from torch import Tensor

from rlinf_lite.errors import ConfigError
from rlinf_lite.models.attention import Layout, Rule
from rlinf_lite.training.megatron.core import (
    MegatronModule,
    ModuleSpec,
    TransformerBlockSubmodules,
    TransformerConfig,
    get_gpt_layer_local_spec,
)
from rlinf_lite.training.megatron.sequence import GatheringLinear, ScatteringLinear
from rlinf_lite.weights.megatron.architecture import Architecture

Implementation = Literal["local", "transformer_engine"]


class ForestAttention(MegatronModule):
    """In the place of Megatron's core attention."""

    def __init__(self, config: TransformerConfig, layer_number: int, *_: Any, rotary_scaling: float, **__: Any) -> None:
        """Args: rotary_scaling: of rotated queries and keys; it is in the scores twice."""
        super().__init__(config=config)
        self._layer = layer_number - 1
        self._rule = Rule(scaling=config.kv_channels**-0.5 * rotary_scaling**2)
        self.layout: Layout | None = None
        """Of the unit that is computed."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """q [N, 1, H, D], k and v [N, 1, K, D] -> [N, 1, H * D]."""
        assert self.layout is not None
        q_HND, k_KND, v_KND = (x.squeeze(1).transpose(0, 1) for x in (query, key, value))
        return self.layout.attend(self._layer, q_HND, k_KND, v_KND, self._rule).flatten(1).unsqueeze(1)


def block_spec(
    arch: Architecture, implementation: Implementation, *, sequence_parallel: bool, rotary_scaling: float
) -> TransformerBlockSubmodules:
    """All layers of a model, and its last norm."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=arch.qk_norm)
    layer, attention, mlp = spec.submodules, spec.submodules.self_attention.submodules, spec.submodules.mlp.submodules
    attention.core_attention = ModuleSpec(module=ForestAttention, params={"rotary_scaling": rotary_scaling})
    if implementation == "transformer_engine":
        from megatron.core.extensions import transformer_engine as engine  # only where it is installed

        layer.input_layernorm = layer.pre_mlp_layernorm = engine.TENorm
        if arch.qk_norm:
            attention.q_layernorm = attention.k_layernorm = engine.TENorm
        attention.linear_qkv = mlp.linear_fc1 = engine.TEColumnParallelLinear
        attention.linear_proj = mlp.linear_fc2 = engine.TERowParallelLinear
    elif sequence_parallel:
        attention.linear_qkv = mlp.linear_fc1 = GatheringLinear
        attention.linear_proj = mlp.linear_fc2 = ScatteringLinear
    # Named, or the last norm would be Transformer Engine's wherever that is installed, also on a CPU.
    return TransformerBlockSubmodules(layer_specs=[spec] * arch.num_layers, layer_norm=layer.input_layernorm)


def require_transformer_engine(device: torch.device) -> None:
    """Check that Transformer Engine's layers can be built.

    Raises:
        ConfigError: ``device`` is no GPU, or it is not installed.
    """
    problem = None
    if device.type != "cuda":
        problem = "Transformer Engine computes on GPUs only"
    else:
        try:
            importlib.import_module("transformer_engine.pytorch")
        except (ImportError, OSError, RuntimeError) as error:  # also without its libraries
            problem = f"Transformer Engine cannot be imported ({error})"
    if problem is not None:
        raise ConfigError(
            problem,
            key="actor.megatron.transformer_impl",
            value="transformer_engine",
            remedy="pip install transformer-engine[pytorch] on a machine with GPUs, or set it to local",
        )
