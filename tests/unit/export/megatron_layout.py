"""Checkpoints in Megatron's layout as Megatron-LM writes them: made from its documented structure, not by our code."""

import argparse
import io
import random
from collections import OrderedDict

import numpy as np
import torch
from torch.nn import functional

FUSED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def rank_tensors(config, tensors, size, rank, *, padded):
    """Name and tensor of each parameter of one rank, in the order of ``named_parameters()`` of the local spec."""
    groups = config.num_key_value_heads

    def rows(tensor):
        return tensor.chunk(size)[rank]

    def fused(layer, kind):
        parts = [tensors[f"{layer}self_attn.{x}_proj.{kind}"] for x in "qkv"]
        by_group = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
        whole = torch.stack([torch.cat([part[g] for part in by_group]) for g in range(groups)])
        return rows(whole.reshape(-1, *whole.shape[2:]))

    def vocabulary(tensor):
        return rows(functional.pad(tensor, (0, 0, 0, padded - len(tensor))))

    found = [("embedding.word_embeddings.weight", vocabulary(tensors["model.embed_tokens.weight"]))]
    for number in range(config.num_hidden_layers):
        ours, theirs = f"decoder.layers.{number}.", f"model.layers.{number}."
        found.append((f"{ours}input_layernorm.weight", tensors[f"{theirs}input_layernorm.weight"]))
        columns = tensors[f"{theirs}self_attn.o_proj.weight"].chunk(size, 1)[rank]
        found.append((f"{ours}self_attention.linear_proj.weight", columns))
        found.append((f"{ours}self_attention.linear_qkv.weight", fused(theirs, "weight")))
        if config.model_type == "qwen2":
            found.append((f"{ours}self_attention.linear_qkv.bias", fused(theirs, "bias")))
        found.append((f"{ours}pre_mlp_layernorm.weight", tensors[f"{theirs}post_attention_layernorm.weight"]))
        gate, up = (rows(tensors[f"{theirs}mlp.{x}_proj.weight"]) for x in ("gate", "up"))
        found.append((f"{ours}mlp.linear_fc1.weight", torch.cat([gate, up])))
        found.append((f"{ours}mlp.linear_fc2.weight", tensors[f"{theirs}mlp.down_proj.weight"].chunk(size, 1)[rank]))
    found.append(("decoder.final_layernorm.weight", tensors["model.norm.weight"]))
    if not config.tie_word_embeddings:
        found.append(("output_layer.weight", vocabulary(tensors["lm_head.weight"])))
    return found


def with_fused_norms(named):
    """As Transformer Engine's layers have them: each norm belongs to the layer after it, before that layer's weight."""
    found, waiting = [], None
    for name, tensor in named:
        tail = name.partition(".layers.")[2].partition(".")[2]
        if tail in FUSED:
            waiting = (name.removesuffix(tail) + FUSED[tail], tensor)
            continue
        target = waiting and waiting[0].rsplit(".", 1)[0]
        if waiting and name == f"{target}.weight":
            found.append(waiting)
            waiting = None
        found.append((name, tensor))
    return found


def flat(named):
    """Reverse order, each start rounded up to 64 floats."""
    end, places = 0, []
    for name, tensor in reversed(named):
        start = -(-end // 64) * 64
        end = start + tensor.numel()
        places.append((name, start, end))
    whole = torch.zeros(end)
    for name, start, stop in places:
        whole[start:stop] = dict(named)[name].reshape(-1).float()
    return whole


def write(
    directory, config, master, moments, *, size, step, dtype=torch.float32, version="0.16", spec="local", divisor=8
):
    """Write ``directory/iter_N/mp_rank_*`` and the tracker.

    Args:
        master: float32 tensors by Hugging Face names.
        moments: ``(first, second)``, each like ``master``.
        version: of megatron-core: 0.13, 0.16 or 0.19.
    """
    multiple = divisor * size
    padded = -(-config.vocab_size // multiple) * multiple
    for rank in range(size):
        parts = [rank_tensors(config, tensors, size, rank, padded=padded) for tensors in (master, *moments)]
        if spec == "te":
            parts = [with_fused_norms(named) for named in parts]
        state = OrderedDict((name, tensor.to(dtype).clone()) for name, tensor in parts[0])
        for name in [name for name in state if name.endswith(("linear_qkv.weight", "linear_fc1.weight"))]:
            extra = f"{name.removesuffix('weight')}_extra_state"
            state[extra] = io.BytesIO(b"") if spec == "te" else None
        values = {key: flat(named) for key, named in zip(("param", "exp_avg", "exp_avg_sq"), parts, strict=True)}
        buffer = {**values, "numel_unpadded": len(values["param"])}
        target = directory / f"iter_{step:07d}" / f"mp_rank_{rank:02d}"
        target.mkdir(parents=True)
        torch.save({"buckets_coalesced": True, 0: {(dtype, torch.float32): buffer}}, target / "distrib_optim.pt")
        torch.save(model_file(config, state, size, step, dtype, version), target / "model_optim_rng.pt")
    (directory / "latest_checkpointed_iteration.txt").write_text(str(step))
    return padded


def model_file(config, state, size, step, dtype, version):
    group = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False, "lr": 2e-4}
    group |= {"bias_correction": True, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": step}
    if version != "0.13":
        group |= {"default_config": True, "max_lr": 3e-4, "min_lr": 1e-5}
    if version == "0.19":
        group |= {"start_wd": 0.1, "end_wd": 0.1, "optimizer": "adam"}
    args = argparse.Namespace(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        tensor_model_parallel_size=size,
        pipeline_model_parallel_size=1,
        params_dtype=dtype,
        consumed_train_samples=step * 8,
        data_path=None,
    )
    rng = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.zeros(16, dtype=torch.uint8),
        "rng_tracker_states": {"model-parallel-rng": torch.zeros(16, dtype=torch.uint8)},
    }
    content = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": step,
        "model": state,
        "optimizer": {"optimizer": {"param_groups": [group, {**group, "wd_mult": 0.0}]}},
        "opt_param_scheduler": {"max_lr": 3e-4, "num_steps": step * 8, "lr_decay_style": "cosine"},
        "rng_state": [rng],
        "num_floating_point_operations_so_far": 0,
    }
    if version == "0.13":
        content["rerun_state_machine"] = {"mode": "disabled", "sharded": {"current_iteration": step}, "state": None}
    return content


def read(directory, size):
    """What each rank's files hold, by stock torch: ``[(model, flat buffer)]``."""
    (iteration,) = directory.glob("iter_*")
    found = []
    for rank in range(size):
        model = torch.load(iteration / f"mp_rank_{rank:02d}" / "model_optim_rng.pt", weights_only=False)
        optimizer = torch.load(iteration / f"mp_rank_{rank:02d}" / "distrib_optim.pt", weights_only=False)
        assert optimizer["buckets_coalesced"] is True and set(optimizer) == {"buckets_coalesced", 0}
        ((kinds, buffer),) = optimizer[0].items()
        assert kinds[1] == torch.float32 and buffer["numel_unpadded"] == len(buffer["param"])
        found.append((model, kinds[0], buffer))
    return found
