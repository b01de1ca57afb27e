"""The keys of RLinf's Megatron example, word for word: what each is taken for, and which values are refused."""

from __future__ import annotations

import re

import pytest
import yaml
from omegaconf import OmegaConf

from rlinf_lite.config import Config, ConfigError, build, check, flatten, known_keys, rlinf
from rlinf_lite.config.compose import CONFIGS, load
from rlinf_lite.config.rlinf_keys import TAKEN

# examples/reasoning/config/math/qwen2.5-1.5b-grpo-megatron.yaml: `actor`, keys and values.
ACTOR = """
group_name: "ActorGroup"
training_backend: megatron
mcore_gpt: True
spec_name: decoder_gpt
offload_optimizer: True
offload_weight: True
offload_grad: True
enable_dp_load_balance: False
calculate_flops: False
seed: 1234
model: {megatron_checkpoint: null, precision: fp16, add_bias_linear: False, tensor_model_parallel_size: 2,
  pipeline_model_parallel_size: 1, activation: swiglu, sequence_parallel: True, recompute_method: block,
  recompute_granularity: full, recompute_num_layers: 20, seq_length: "${runner.seq_length}",
  encoder_seq_length: "${runner.seq_length}", normalization: rmsnorm, position_embedding_type: rope,
  apply_rope_fusion: True, bias_dropout_fusion: False, persist_layer_norm: False, bias_activation_fusion: False,
  attention_softmax_in_fp32: True, batch_p2p_comm: False, variable_seq_lengths: True,
  gradient_accumulation_fusion: False, moe_token_dispatcher_type: alltoall, use_cpu_initialization: False}
optim: {optimizer: adam, bf16: False, fp16: True, lr: 2e-05, adam_beta1: 0.9, adam_beta2: 0.95, adam_eps: 1.0e-05,
  min_lr: 2.0e-6, weight_decay: 0.05, use_distributed_optimizer: True, overlap_grad_reduce: False,
  overlap_param_gather: False, optimizer_enable_pin: false, overlap_param_gather_with_optimizer_step: False,
  clip_grad: 0.8, loss_scale: 65536}
lr_sched: {lr_warmup_fraction: 0.01, lr_warmup_init: 0.0, lr_warmup_iters: 0, max_lr: 2.0e-5, min_lr: 0.0,
  lr_decay_style: constant, lr_decay_iters: 10}
tokenizer: {tokenizer_model: /model, use_fast: False, trust_remote_code: True, padding_side: 'right'}
megatron:
  ddp_bucket_size: null
  distributed_backend: nccl
  distributed_timeout_minutes: 30
  ckpt_format: torch
  use_dist_ckpt: False
  tp_comm_bootstrap_backend: nccl
  tp_comm_overlap_cfg: null
  use_hf_ckpt: True
  use_profiler: False
  ckpt_convertor: {model: DeepSeek-R1-Distill-Qwen-1.5B, hf_model_path: "${rollout.model.model_path}",
    save_path: "${runner.output_dir}/${runner.experiment_name}/converted_ckpts/actor", use_gpu_num: 0,
    use_gpu_index: null, process_num: 16, tensor_model_parallel_size: "${actor.model.tensor_model_parallel_size}",
    pipeline_model_parallel_size: "${actor.model.pipeline_model_parallel_size}"}
  profiler: {output_dir: "${runner.output_dir}/profiler", activities: ["cpu", "cuda"], record_shapes: False,
    profile_memory: False, with_stack: False, with_flops: False, with_modules: True, export_tensorboard: True,
    export_chrome_trace: False, chrome_filename_prefix: "chrome_trace", schedule_warmup: 2, schedule_active: 1,
    schedule_repeat: 1}
"""
# qwen2.5-1.5b-grpo-fsdp.yaml: what `actor` has besides.
FSDP = """
enable_offload: True
global_batch_size: 8
micro_batch_size: 1
model: {model_path: /model, precision: fp32, is_lora: False}
fsdp_config: {strategy: "fsdp", sharding_strategy: "full_shard", cpu_offload: False, offload_pin_memory: False,
  reshard_after_forward: True, enable_gradient_accumulation: True, forward_prefetch: False, limit_all_gathers: False,
  backward_prefetch: null, use_orig_params: False, use_liger_kernel: False,
  mixed_precision: {param_dtype: "fp16", reduce_dtype: "fp16", buffer_dtype: "fp32"},
  amp_autocast: {enabled: True, precision: "fp16"}, grad_scaler: {enabled: True}}
"""
# What asks for speed or memory alone, and is not there either.
IN_VAIN = ["actor.offload_optimizer", "actor.offload_weight", "actor.offload_grad", "actor.model.apply_rope_fusion"]
NO_FP16 = {
    "actor.model.precision": "bf16",
    "actor.optim.fp16": False,
    "actor.optim.bf16": True,
    "actor.optim.loss_scale": None,
}
ACTOR_KEYS = yaml.safe_load(ACTOR)
SHIPPED = yaml.safe_load((CONFIGS / "qwen2.5-1.5b-grpo-megatron.yaml").read_text())


def example(values=None, note=rlinf.silent) -> Config:
    raw = OmegaConf.create(
        {
            "runner": {"task_type": "reasoning", "experiment_name": "x"},
            "rollout": {"model": {"model_path": "/model"}},
            "data": {"type": "arithmetic"},
            "actor": ACTOR_KEYS,
        }
    )
    for key, value in (values or {}).items():
        OmegaConf.update(raw, key, value, force_add=True)
    config = build(raw, note)
    check(config)
    return config


@pytest.mark.parametrize(("written", "held"), [("k1", "kl"), ("k2", "mse"), ("k3", "low_var_kl"), ("abs", "abs")])
def test_estimators_of_the_kl_have_two_names(written, held):
    corrected = {"algorithm.kl_beta": 0.1, "algorithm.kl_importance_correction": True} if held == "kl" else {}
    config = example({"algorithm.kl_penalty_type": written, **corrected})
    assert config.algorithm.kl_penalty_type == held


def leaves(node, prefix=""):
    found = []
    for name, value in node.items():
        found += leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]
    return found


def test_the_examples_keys_are_taken():
    config = example()
    assert config.runner.task_type == "math"
    assert config.actor.model.model_path == config.actor.tokenizer.tokenizer_model == "/model"
    megatron, optim = config.actor.megatron, config.actor.optim
    assert (megatron.tensor_model_parallel_size, megatron.recompute_num_layers) == (2, 20)
    assert (config.actor.model.precision, megatron.loss_scale) == ("fp16", 65536.0)
    assert megatron.sequence_parallel
    assert (optim.lr, optim.lr_scheduler, optim.lr_warmup_steps, optim.total_training_steps) == (
        2e-5,
        "constant",
        1,
        10,
    )
    assert (config.cluster.device, config.runner.hang_timeout) == ("cuda", 1800.0)
    assert build(flatten_nested(config)) == config, "what a run writes down can be run again"


def test_what_changes_no_result_is_noted():
    notes = []
    config = example(note=notes.append)
    assert [line.partition("=true has no effect: ")[0] for line in notes] == IN_VAIN
    silent = []
    assert config == example(dict.fromkeys(IN_VAIN, False), silent.append)
    assert silent == []


NOTED = {
    "actor.calculate_flops": (True, "true has no effect: the metric throughput/mfu is in every"),
    "actor.enable_dp_load_balance": (True, "true has no effect: ranks compute micro-batches of like size together any"),
    "actor.optim.overlap_grad_reduce": (True, "true has no effect: communication and"),
    "actor.model.variable_seq_lengths": (False, "false has no effect: nothing is padded to runner.seq_length"),
    "actor.megatron.ddp_bucket_size": (4096, "4096 has no effect: there is one bucket"),
    "actor.megatron.tp_comm_overlap_cfg": ("a.yaml", "a.yaml has no effect: communication"),
    "algorithm.rollout_batch_size_per_gpu": (64, "64 has no effect: rollout.max_running_requests limits what"),
}
NOTED_WITH_VLLM = {
    "rollout.disable_log_stats": (False, "false has no effect: engines log no"),
    "rollout.vllm.attention_backend": ("FLASH_ATTN", "FLASH_ATTN has no effect: vLLM is set up with the keys"),
}


@pytest.mark.parametrize(("backend", "noted"), [("builtin", NOTED), ("vllm", NOTED_WITH_VLLM)], ids=["builtin", "vllm"])
def test_noted_by_name(backend, noted):
    notes = []
    values = {"rollout.rollout_backend": backend, **{key: value for key, (value, _) in noted.items()}}
    example(NO_FP16 | dict.fromkeys(IN_VAIN, False) | values, notes.append)
    assert len(notes) == len(noted)
    for key, (_, said) in noted.items():
        assert [line for line in notes if line.startswith(f"{key}={said}")], key


def flatten_nested(config):
    raw = OmegaConf.create()
    for key, value in flatten(config).items():
        OmegaConf.update(raw, key, value, force_add=True)
    return raw


def test_the_shipped_config_has_every_key_of_the_example():
    assert leaves(SHIPPED["actor"]) == leaves(ACTOR_KEYS)
    of_fsdp = {f"actor.{key}" for key in leaves(yaml.safe_load(FSDP))}
    of_others = {"actor.optim.loss_scale_window"}
    assert set(leaves(SHIPPED)) >= TAKEN.keys() - of_fsdp - of_others, "and the other sections have theirs"
    notes = []
    config = load(["qwen2.5-1.5b-grpo-megatron"], notes.append)
    assert [line.partition("=true has no effect: ")[0] for line in notes] == IN_VAIN
    assert config.actor.model.model_path == "/path/to/Qwen2.5-1.5B"
    assert config.actor.optim.lr_warmup_steps == 10


EDITED = {
    "rollout.rollout_backend": "sglang",
    "algorithm.early_stop_imp_ratio": "5.0",
    "rollout.gpu_memory_utilization": "0.55",
    "rollout.enforce_eager": "False",
}


@pytest.mark.parametrize("written", [f"{key}={value}" for key, value in EDITED.items()])
def test_what_had_to_be_edited(written):
    """Behind a # in the shipped config, and in the table of docs/megatron.md. The last two are for vLLM."""
    with pytest.raises(ConfigError):
        load(["qwen2.5-1.5b-grpo-megatron", written])


def test_the_7b_examples_key_is_taken():
    megatron = example({"actor.optim.loss_scale": None, "actor.optim.loss_scale_window": 5}).actor.megatron
    assert (megatron.loss_scale, megatron.loss_scale_window) == (None, 5)


@pytest.mark.parametrize(
    ("spec", "layers"), [("decoder_gpt", "local"), ("local_gpt", "local"), ("te_gpt", "transformer_engine")]
)
def test_the_name_of_a_spec_chooses_the_layers(spec, layers):
    given = {"actor.spec_name": spec, "actor.model.sequence_parallel": False}
    assert example(given).actor.megatron.transformer_impl == layers


def test_a_scale_by_valid_tokens_is_taken_where_it_is_the_mean_over_tokens():
    scaled = {"algorithm.use_valid_token_scale": True, "algorithm.loss_agg_func": "token-mean"}
    assert example(scaled | {"algorithm.n_minibatches": 1}) == example({"algorithm.n_minibatches": 1})
    with pytest.raises(ConfigError, match=r"n_minibatches=4 RLinf divides .* the whole step, .*; set it to false"):
        example(scaled | {"algorithm.n_minibatches": 4})
    with pytest.raises(ConfigError, match=r"loss_agg_func=seq-mean-token-sum weights tokens; set it to false, or"):
        example(scaled | {"algorithm.n_minibatches": 1, "algorithm.loss_agg_func": "seq-mean-token-sum"})


def test_the_fsdp_examples_keys_are_taken():
    raw = {"runner": {"experiment_name": "x"}, "data": {"type": "arithmetic"}, "actor": yaml.safe_load(FSDP)}
    with pytest.raises(ConfigError) as caught:
        check(build(OmegaConf.create(raw)))
    named = {line.split("=")[0] for line in str(caught.value).splitlines()}
    assert named == {"actor.fsdp_config.amp_autocast.enabled"}
    fsdp = raw["actor"]["fsdp_config"]
    fsdp["amp_autocast"]["enabled"] = fsdp["grad_scaler"]["enabled"] = False
    notes = []
    config = build(OmegaConf.create(raw), notes.append)
    check(config)
    (line,) = notes
    assert line.startswith("actor.enable_offload=true has no effect: ") and "fsdp_config.cpu_offload=true" in line
    assert (
        config.actor.fsdp_config.strategy == "fsdp" and config.actor.fsdp_config.mixed_precision.param_dtype == "fp16"
    )


REFUSED = {
    "actor.mcore_gpt": (False, "false: the model is Megatron-core's; set it to true"),
    "actor.spec_name": ("mamba", "mamba: .*set it to decoder_gpt or local_gpt or te_gpt"),
    "actor.model.normalization": ("layernorm", "layernorm: .*; set it to rmsnorm"),
    "actor.megatron.use_profiler": (True, "true: there is no profiler; .* set it to false"),
    "actor.optim.optimizer": ("sgd", "sgd: the optimizer is AdamW; set it to adam"),
    "actor.optim.loss_scale": ("much", "much: takes a number"),
    "actor.optim.bf16": (False, "false: actor.model.precision=bf16; set it to true"),
    "actor.lr_sched.max_lr": (1e-4, "0.0001: actor.optim.lr=2e-05 is the same setting; write one"),
    "actor.lr_sched.lr_decay_style": ("WSD", "WSD: .*; set it to constant or linear or cosine"),
    "actor.megatron.distributed_timeout_minutes": ("long", "long: takes a number"),
    "actor.megatron.distributed_backend": ("mpi", "mpi: .*; set it to nccl or gloo"),
    "actor.calculate_flops": ("often", "often: .*; set it to false or true"),
    "actor.model.attention_softmax_in_fp32": (False, "false: .* set it to true"),
}


def test_refused_by_name():
    with pytest.raises(ConfigError) as caught:
        example(NO_FP16 | {key: value for key, (value, _) in REFUSED.items()})
    lines = str(caught.value).splitlines()
    assert len(lines) == len(REFUSED)
    for key, (_, said) in REFUSED.items():
        assert [line for line in lines if re.match(f"{re.escape(key)}={said}", line)], key


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"actor.optim.loss_scale": 0}, "loss_scale=0.0"),
        ({"actor.lr_sched.lr_decay_style": "linear"}, "min_lr=0.0: actor.optim.min_lr=2e-06 is the same setting"),
        ({"actor.lr_sched.lr_decay_iters": None}, "lr_warmup_fraction=0.01: of which number of steps"),
        ({"actor.lr_sched.lr_decay_iters": "many"}, "lr_warmup_fraction=0.01: of which number of steps"),
        ({"cluster.device": "cpu"}, "distributed_backend=nccl: cluster.device=cpu is the same setting"),
        (
            {"actor.model.seq_length": 64, "runner.seq_length": 2048},
            "seq_length=64: runner.seq_length=2048 is the same setting",
        ),
        (
            {"actor.megatron.profiler.with_stak": 1},
            "profiler.with_stak: unknown key; did you mean actor.megatron.profiler.with_stack",
        ),
        (
            {"rollout.rollout_backend": "vllm", "rollout.vllm.torch_profiler_dir": "x"},
            "torch_profiler_dir=x: there is no profiler",
        ),
    ],
)
def test_one_refused_by_name(values, said):
    with pytest.raises(ConfigError, match=said):
        example(NO_FP16 | values)


def test_what_is_for_vllm_counts_with_vllm_only():
    notes = []
    given = {"rollout.disable_log_stats": False, "rollout.vllm.attention_backend": "X", "rollout.eos": None}
    config = example(NO_FP16 | given | dict.fromkeys(IN_VAIN, False), notes.append)
    assert config.rollout.rollout_backend == "builtin" and notes == []


def test_an_override_can_lead_to_one():
    assert example(NO_FP16 | {"rollout.max_running_requests": "${actor.megatron.ckpt_convertor.process_num}"})


def test_none_is_a_key_of_ours():
    assert not TAKEN.keys() & set(known_keys())
    assert {spec.sets for spec in TAKEN.values() if spec.sets} <= set(known_keys())
