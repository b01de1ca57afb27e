"""Megatron-core's GPTModel, filled from a Hugging Face directory: what it says of a unit's loss tokens.

Two parts are ours. Attention (layers.py) works over the unit's own layout, so a shared prompt is computed once and
nothing is padded. Rotary embeddings take each token's position in its own sequence; Megatron's count along the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from rlinf_lite.config import MegatronConfig, ModelConfig
from rlinf_lite.models import build, hf_directory
from rlinf_lite.models.attention import Layout
from rlinf_lite.models.segments import FlatTokens
from rlinf_lite.training.fsdp.model import TokenOutputs
from rlinf_lite.training.megatron.core import GPTModel, TransformerConfig
from rlinf_lite.training.megatron.groups import RankGroups
from rlinf_lite.training.megatron.head import VocabRange, token_stats
from rlinf_lite.training.megatron.layers import Implementation, block_spec, require_transformer_engine
from rlinf_lite.training.megatron.sequence import all_tokens, own_tokens
from rlinf_lite.types import TokenBatch
from rlinf_lite.weights.hf import HfWeights
from rlinf_lite.weights.megatron.architecture import Architecture
from rlinf_lite.weights.megatron.described import described
from rlinf_lite.weights.megatron.mapping import Partition, weights
from rlinf_lite.weights.names import WeightNames


class MegatronModel:
    """A policy whose layers are divided over tensor-parallel ranks. Methods are collective over those."""

    def __init__(
        self,
        settings: ModelConfig,
        megatron: MegatronConfig,
        *,
        model_dir: Path,
        groups: RankGroups,
        device: torch.device,
        temperature: float,
    ) -> None:
        """Build the model and fill it.

        Args:
            model_dir: Hugging Face directory with the base weights.

        Raises:
            ConfigError: Megatron or this backend has not what the model needs, or Transformer Engine is asked for where
                it cannot be; says what.
        """
        if megatron.transformer_impl == "transformer_engine":
            require_transformer_engine(device)
        config = hf_directory.load_config(model_dir, settings.model_type)
        arch = Architecture.of(config)
        arch.check_tensor_parallel(groups.tensor.size())
        self.device, self.groups, self._temperature = device, groups, temperature
        self.partition = Partition.of(arch, groups.tensor.size(), megatron.make_vocab_size_divisible_by)
        self.vocab_divisor = megatron.make_vocab_size_divisible_by
        bare = build.build_on_meta(config, settings.precision)
        self.names = WeightNames.of(bare)
        frequencies, rotary_scaling = _rotary(bare)
        self._inv_freq = frequencies.to(device)
        num_recomputed = arch.num_layers if megatron.recompute_num_layers is None else megatron.recompute_num_layers
        self.sequence_parallel = megatron.sequence_parallel and groups.tensor.size() > 1
        """Whether norms and residuals are divided over the tensor-parallel ranks."""
        self._num_recomputed = num_recomputed if megatron.recompute_granularity == "full" else 0
        self.gpt = _build(
            config,
            self.partition,
            build.DTYPES[settings.precision],
            transformer_impl=megatron.transformer_impl,
            sequence_parallel=self.sequence_parallel,
            rotary_scaling=rotary_scaling,
        )
        self._fill(HfWeights(model_dir, self.names))
        self.gpt.to(device)
        rows = self.partition.padded_vocab_size // groups.tensor.size()
        first = rows * groups.tensor.rank()
        count = min(max(arch.vocab_size - first, 0), rows)
        self._vocab = VocabRange(first=first, count=count, group=groups.tensor)
        self.described = described(config)
        """For checkpoints."""

    @torch.no_grad()
    def _fill(self, source: HfWeights) -> None:
        params = dict(self.gpt.named_parameters())
        mapped = weights(self.partition.arch)
        assert [weight.name for weight in mapped] == list(params), "another order than Megatron's"
        for weight in mapped:
            whole = [source.read(name) for name in weight.sources]
            params[weight.name].copy_(self.partition.shard(weight, whole, self.groups.tensor.rank()))

    def __call__(self, unit: TokenBatch, *, with_entropy: bool = False) -> TokenOutputs:
        """Compute what the model says of a unit's loss tokens; with gradients, unless they are turned off."""
        multiple = self.groups.tensor.size() if self.sequence_parallel else 1
        tokens = FlatTokens.of(unit.ids_N, unit.positions_N, unit.segments, self.device, multiple=multiple)
        hidden_MD = self._hidden(tokens)[unit.source_M.to(self.device)]
        logprob_M, entropy_M = token_stats(
            hidden_MD,
            self._output_weight(),
            unit.targets_M.to(self.device),
            self._temperature,
            self._vocab,
            with_entropy=with_entropy,
        )
        return TokenOutputs(logprob_M=logprob_M, entropy_M=entropy_M)

    def _hidden(self, tokens: FlatTokens) -> Tensor:
        """[N, D] after the last norm."""
        angles = tokens.positions_N[:, None].float() * self._inv_freq
        rotary = torch.cat([angles, angles], -1)[:, None, None, :]
        hidden = self.gpt.embedding(input_ids=tokens.ids_N[None], position_ids=tokens.positions_N[None])
        if self.sequence_parallel:
            hidden = own_tokens(hidden, self.groups.tensor)
        for number, layer in enumerate(self.gpt.decoder.layers):
            run = _with_layout(layer, tokens.layout, rotary)
            if number < self._num_recomputed and torch.is_grad_enabled():
                hidden = checkpoint(run, hidden, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = run(hidden)
        hidden = self.gpt.decoder.final_layernorm(hidden)
        return (all_tokens(hidden, self.groups.tensor) if self.sequence_parallel else hidden).squeeze(1)

    def _output_weight(self) -> Tensor:
        tied = self.partition.arch.tied
        return self.gpt.embedding.word_embeddings.weight if tied else self.gpt.output_layer.weight

    @torch.no_grad()
    def forward(self, units: Sequence[TokenBatch | None]) -> dict[int, Tensor]:
        """As `Trainer.forward`; other data-parallel ranks take no part."""
        found: dict[int, Tensor] = {}
        for unit in units:
            if unit is not None:
                logprob_M = self(unit).logprob_M
                assert logprob_M is not None
                found[unit.index] = logprob_M.cpu()
        return found


def _with_layout(layer: nn.Module, layout: Layout, rotary: Tensor) -> Callable[[Tensor], Tensor]:
    """One layer on one unit; also when it is recomputed in the backward pass, after other units."""

    def run(hidden: Tensor) -> Tensor:
        layer.self_attention.core_attention.layout = layout  # type: ignore[union-attr]
        found, _ = layer(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary)
        return found

    return run


def _build(
    config: PretrainedConfig,
    partition: Partition,
    dtype: torch.dtype,
    *,
    transformer_impl: Implementation,
    sequence_parallel: bool,
    rotary_scaling: float,
) -> GPTModel:
    """In CPU memory, without values."""
    arch = partition.arch
    settings = TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_dim,
        ffn_hidden_size=arch.ffn_size,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        gated_linear_unit=True,
        activation_func=functional.silu,
        normalization="RMSNorm",
        layernorm_epsilon=config.rms_norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        tensor_model_parallel_size=partition.size,
        use_cpu_initialization=True,
        perform_initialization=False,
        deterministic_mode=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )
    layers = block_spec(arch, transformer_impl, sequence_parallel=sequence_parallel, rotary_scaling=rotary_scaling)
    return GPTModel(
        config=settings,
        transformer_layer_spec=layers,
        vocab_size=partition.padded_vocab_size,
        max_sequence_length=config.max_position_embeddings,
        position_embedding_type="rope",
        parallel_output=True,
        share_embeddings_and_output_weights=arch.tied,
    )


def _rotary(bare: nn.Module) -> tuple[Tensor, float]:
    """What transformers computes: rotary frequencies, float32 [D / 2], and by how much it scales cosines and sines."""
    rotary = bare.base_model.rotary_emb  # type: ignore[union-attr]
    return rotary.inv_freq.detach().clone(), float(rotary.attention_scaling)  # type: ignore[union-attr, operator, arg-type]
