"""What Megatron's two files hold beside tensors, under the names of Megatron-LM (core 0.13 to 0.19)."""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlinf_lite.checkpoint.file_state import Copied
from rlinf_lite.weights.megatron.mapping import Partition

CHECKPOINT_VERSION = 3.0


def arguments(partition: Partition, *, dtype: torch.dtype, model: Mapping[str, Any], vocab_divisor: int) -> Namespace:
    """What Megatron's loader compares with its own arguments, and what describes the model.

    Args:
        dtype: of the parameters.
        model: what is `described` of it.
        vocab_divisor: ``make_vocab_size_divisible_by``.
    """
    arch = partition.arch
    return Namespace(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_size,
        num_attention_heads=arch.num_heads,
        group_query_attention=arch.num_kv_heads != arch.num_heads,
        num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_dim,
        add_position_embedding=True,
        normalization="RMSNorm",
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        untie_embeddings_and_output_weights=not arch.tied,
        make_vocab_size_divisible_by=vocab_divisor,
        padded_vocab_size=partition.padded_vocab_size,
        tensor_model_parallel_size=partition.size,
        pipeline_model_parallel_size=1,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        transformer_impl="local",
        use_distributed_optimizer=True,
        ckpt_format="torch",
        consumed_train_samples=0,
        skipped_train_samples=0,
        consumed_valid_samples=0,
        **model,
    )


def param_groups(
    *, lr: float, max_lr: float, min_lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int
) -> list[dict[str, Any]]:
    """Adam's groups of parameters, matrices first, then vectors, which have no weight decay.

    Args:
        step: optimizer steps that were taken.
    """
    return [
        {
            "wd_mult": wd_mult,
            "lr_mult": 1.0,
            "is_expert_parallel": False,
            "is_decoupled_lr": False,
            "default_config": wd_mult == 1.0,
            "max_lr": max_lr,
            "min_lr": min_lr,
            "lr": lr,
            "bias_correction": True,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay * wd_mult,
            "step": step,
        }
        for wd_mult in (1.0, 0.0)
    ]


def model_file(iteration: int, args: Namespace, model: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The content of the file.

    Args:
        model: tensors by Megatron's names, in its order.
        more: ``optimizer``, ``opt_param_scheduler``, ``rng_state``; left out where only weights are saved.
    """
    return {
        "args": args,
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": iteration,
        "model": OrderedDict(model),
        "num_floating_point_operations_so_far": 0,
        **more,
    }


def optimizer_file(parts: Mapping[str, object], *, dtype: torch.dtype, num_floats: int) -> dict[Any, Any]:
    """The content of ``distrib_optim.pt``.

    Args:
        parts: the flat tensors: float32 parameters, first and second moment.
        dtype: of the model's parameters.
        num_floats: of each part.
    """
    return {"buckets_coalesced": True, 0: {(dtype, torch.float32): {**parts, "numel_unpadded": num_floats}}}


def unchanging(tensor: Tensor) -> object:
    """``tensor`` as content of a file for which the next optimizer step need not wait: nobody changes it."""
    return Copied(tensor)
