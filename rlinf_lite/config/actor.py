"""The ``actor`` section: the model that is trained, its optimizer and how it is sharded."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from omegaconf import MISSING
from pydantic import Field

from rlinf_lite.config.fields import (
    Count,
    CountOrZero,
    Fraction,
    Neutral,
    NonNegative,
    PathText,
    Precision,
    Section,
    Seed,
    follows,
)

_Beta = Annotated[float, Ge(0), Lt(1)]


class ModelConfig(Section):
    model_path: Neutral[PathText] = MISSING
    """A Hugging Face directory (config, safetensors, tokenizer), or ``embedded:tiny-arithmetic``."""
    model_type: Neutral[str | None] = None
    """If set, the directory must hold this architecture (``llama``, ``qwen2.5``, ...)."""
    precision: Precision = "fp32"
    """Type of parameters and optimizer state: ``fp32``, or ``bf16``: half the memory, but small updates are rounded
    away. With Megatron the optimizer's state is float32, and there is ``fp16``, too."""
    dropout: bool = False
    """Keep the dropout that the directory's config asks for. Without it the policy that is updated is the one that was
    sampled, so old and new log-probs differ by the updates alone."""


class PolicyModelConfig(ModelConfig):
    """As `ModelConfig`, with what RLinf's configs have here for Megatron."""

    tensor_model_parallel_size: Neutral[Count] = 1
    """RLinf's place for ``actor.megatron.tensor_model_parallel_size``, which follows it."""
    pipeline_model_parallel_size: Neutral[Literal[1]] = 1
    """RLinf's place for ``actor.megatron.pipeline_model_parallel_size``. Only 1."""
    sequence_parallel: Neutral[bool] = False
    """RLinf's place for ``actor.megatron.sequence_parallel``, which follows it."""
    recompute_granularity: Neutral[Literal["full"] | None] = None
    """RLinf's place for ``actor.megatron.recompute_granularity``, which follows it."""


class OptimConfig(Section):
    lr: Fraction = 1.0e-6
    """Learning rate after warm-up."""
    adam_beta1: _Beta = 0.9
    """Adam's decay of the first moment."""
    adam_beta2: _Beta = 0.95
    """Adam's decay of the second moment."""
    adam_eps: Annotated[float, Gt(0), Le(1)] = 1.0e-8
    """Added to the denominator of Adam's update."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay (AdamW)."""
    clip_grad: NonNegative = 1.0
    """Largest global gradient norm; 0: no clipping."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after ``lr_warmup_steps`` of linear warm-up."""
    lr_warmup_steps: CountOrZero = 0
    """Optimizer steps of linear warm-up."""
    total_training_steps: Count | None = None
    """Optimizer steps over which ``linear`` and ``cosine`` decay; null: the steps of the run as configured."""
    min_lr: Fraction = 0.0
    """Learning rate at the end of the decay."""


class MixedPrecisionConfig(Section):
    param_dtype: Precision | None = None
    """Type in which layers compute; null: ``actor.model.precision``."""
    reduce_dtype: Precision | None = None
    """Type in which gradients are reduced; null: ``param_dtype``."""


class GradScalerConfig(Section):
    """Loss scaling, for fp16."""

    enabled: bool = False
    """Scale the loss, so that small gradients are not rounded to 0 in fp16."""
    init_scale: Annotated[float, Gt(0), Le(2.0**32)] = 65536.0
    """Scale at the start."""
    growth_factor: Annotated[float, Gt(1)] = 2.0
    """Factor for the scale after ``growth_interval`` steps with finite gradients."""
    backoff_factor: Annotated[float, Gt(0), Lt(1)] = 0.5
    """Factor for the scale after gradients that are not finite; that update is skipped."""
    growth_interval: Count = 2000
    """Steps with finite gradients after which the scale grows."""


class FsdpConfig(Section):
    strategy: Literal["fsdp2", "fsdp"] = "fsdp2"
    """``fsdp2``, or ``fsdp``: FSDP1. Either loads the other's checkpoints. With ``fsdp`` sums of gradients follow the
    number of ranks, each rank fills a whole model in CPU memory at the start, and a save gathers and copies the
    state."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in CPU memory."""
    reshard_after_forward: bool = True
    """Free the gathered parameters of a layer after its forward pass, and gather them again for the backward pass."""
    virtual_ranks: Count = 5040
    """Slots of a mini-batch: runs of micro-batches, each computed on one rank. The gradients of slots are summed in a
    fixed order, so the number of ranks changes no bit of a run; this number does. Below the number of micro-batches
    there are fewer reductions, but each rank holds a whole gradient in between."""
    mixed_precision: MixedPrecisionConfig = Field(default_factory=MixedPrecisionConfig)
    grad_scaler: GradScalerConfig = Field(default_factory=GradScalerConfig)
    save_full_model_weights: Neutral[bool] = False
    """Write the model as one file, too: ``model_state_dict/full_weights.pt`` in the section of a checkpoint, for
    ``torch.load(weights_only=True)``. The first rank gathers it in CPU memory at the start of each save."""


class MegatronConfig(Section):
    """For ``actor.training_backend: megatron``."""

    tensor_model_parallel_size: Neutral[Count] = follows("actor.model.tensor_model_parallel_size")
    """Ranks over which each layer is divided; must divide the number of actor workers. Neutral, as that number is: a
    checkpoint of another size is resharded."""
    pipeline_model_parallel_size: Neutral[Literal[1]] = follows("actor.model.pipeline_model_parallel_size")
    """Only 1."""
    sequence_parallel: Neutral[bool] = follows("actor.model.sequence_parallel")
    """Divide norms and residuals over the tensor-parallel ranks, too, by tokens: less memory for activations. Without
    tensor parallelism it has no effect. Sums are then taken in another order; a resume that changes it says so."""
    recompute_granularity: Neutral[Literal["full"] | None] = follows("actor.model.recompute_granularity")
    """``full``: recompute each layer in the backward pass instead of keeping its activations; null: keep them."""
    recompute_num_layers: Neutral[Count | None] = None
    """``recompute_granularity: full`` only: so many layers, the first ones, are recomputed; null: all."""
    make_vocab_size_divisible_by: Neutral[Count] = 128
    """The vocabulary is padded to a multiple of this times ``tensor_model_parallel_size``, as Megatron does; padding
    takes no part in any probability."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """``local``: Megatron-core's own layers. ``transformer_engine``: linear layers and norms of Transformer Engine, on
    GPUs where it is installed. Checkpoints are the same."""
    loss_scale: Annotated[float, Gt(0), Le(2.0**32)] | None = None
    """For ``actor.model.precision: fp16``: factor of the loss in the backward pass, so that small gradients are not
    rounded to 0. null: a dynamic one as in Megatron, 2^32 at first, halved after overflows and doubled after
    ``loss_scale_window`` steps without. A step whose gradients overflow is skipped."""
    loss_scale_window: Count = 1000
    """Steps without overflow after which a dynamic scale of the loss doubles."""
    ckpt_format: Neutral[Literal["torch"]] = "torch"
    """Only ``torch``: ``mp_rank_*/model_optim_rng.pt`` and ``distrib_optim.pt``."""


class TokenizerConfig(Section):
    tokenizer_model: Neutral[PathText] = follows("actor.model.model_path")
    """Path of the tokenizer."""


class ActorConfig(Section):
    group_name: Neutral[str] = "ActorGroup"
    """Name of the actor workers in logs."""
    training_backend: Literal["fsdp", "megatron"] = "fsdp"
    """``fsdp``, or ``megatron``: tensor parallelism and checkpoints of Megatron-core (docs/megatron.md)."""
    seed: Seed = 1234
    """Seed of sampling, and of each rank's RNG state."""
    model: PolicyModelConfig = Field(default_factory=PolicyModelConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    fsdp_config: FsdpConfig = Field(default_factory=FsdpConfig)
    megatron: MegatronConfig = Field(default_factory=MegatronConfig)
