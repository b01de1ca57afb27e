"""Keys of RLinf's Megatron and FSDP examples that have no key of their own here: how each is taken, in a table.

A value is given to one of our keys, or says what happens here anyway, or asks for speed or memory alone and has no
effect here, which a note says, or is refused with the remedy. `rlinf` does that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

VALUES = {
    "runner.task_type": {"reasoning": "math"},
    "algorithm.kl_penalty_type": {"k1": "kl", "k2": "mse", "k3": "low_var_kl"},
}
"""Values of our keys that RLinf, or the field, calls otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """How one key is taken."""

    only: tuple[Any, ...] = ()
    """The values that are taken; empty: any."""
    in_vain: bool = False
    """Whether other values than ``only`` are taken, too, with a note: they change no result, but nothing here does what
    they ask for."""
    sets: str = ""
    """Our key that gets the value, unless it has the same one already; empty: none does."""
    convert: Callable[[Any], Any] = lambda value: value
    """The value of ``sets``."""
    with_vllm: bool = False
    """Whether ``only`` counts with ``rollout.rollout_backend: vllm`` alone."""
    why: str = ""
    """Why others are refused or have no effect, or why any will do."""

    @property
    def is_switch(self) -> bool:
        """Whether it is true or false."""
        return bool(self.only) and isinstance(self.only[0], bool)


def _only(value: Any, why: str, *others: Any) -> Taken:
    return Taken(only=(value, *others), why=why)


def _in_vain(value: Any, why: str, *others: Any) -> Taken:
    return Taken(only=(value, *others), in_vain=True, why=why)


def _vllm(value: Any, why: str) -> Taken:
    return Taken(only=(value,), with_vllm=True, why=why)


def _vllm_in_vain(value: Any, why: str) -> Taken:
    return Taken(only=(value,), in_vain=True, with_vllm=True, why=why)


def _sets(key: str, *only: Any, convert: Callable[[Any], Any] = lambda value: value) -> Taken:
    return Taken(only=only, sets=key, convert=convert)


def _any(why: str) -> Taken:
    return Taken(why=why)


_SAMPLING, RATE, _FSDP = "algorithm.sampling_params", "actor.lr_sched", "actor.fsdp_config"
_NOT_FUSED = "there is no such fused kernel here, and the same is computed without it"
_OF_PROFILER = _any("is for `actor.megatron.use_profiler: true`, which is refused")
_OF_CONVERTER = _any("nothing is converted before a start: each rank reads its part of the Hugging Face directory")
_OF_SGLANG = _any("is for `rollout.rollout_backend: sglang`, which is refused")
_OF_VLLM = _vllm_in_vain(None, "vLLM is set up with the keys of `rollout` (docs/vllm.md), and chooses the rest itself")
_IMPLS = {"decoder_gpt": "local", "local_gpt": "local", "te_gpt": "transformer_engine"}
_NO_OVERLAP = "communication and computation do not overlap"
_NO_OFFLOAD = "with GPUs all stays in their memory, beside the engine's (on a CPU there is nothing to offload)"

TOKEN_SCALE = "algorithm.use_valid_token_scale"

TAKEN: dict[str, Taken] = {
    "algorithm.rollout_batch_size_per_gpu": _in_vain(
        None, "rollout.max_running_requests limits what is generated at once"
    ),
    "algorithm.val_rollout_batch_size_per_gpu": _any("`rollout.max_running_requests` limits validation, too"),
    "algorithm.early_stop_imp_ratio": _only(
        None, "no micro-batch is left out for its ratios; algorithm.importance_sampling_fix masks or truncates tokens"
    ),
    TOKEN_SCALE: _only(
        False,
        "all tokens of a mini-batch weigh the same with `algorithm.loss_agg_func: token-mean`; `true` is that with "
        "`algorithm.n_minibatches: 1`, and refused elsewhere",
        True,
    ),
    f"{_SAMPLING}.min_new_tokens": _only(1, "a response ends when the model ends it, after one token or more", 0),
    "rollout.distributed_executor_backend": _vllm("mp", "vLLM's processes are started with multiprocessing"),
    "rollout.disable_log_stats": _vllm_in_vain(True, "engines log no statistics of their own"),
    "rollout.detokenize": _in_vain(False, "engines return token ids"),
    "rollout.padding": _only(None, "nothing is padded"),
    "rollout.eos": _only(None, "what ends a response is in the model's generation config and tokenizer"),
    **{
        f"rollout.sglang.{name}": _OF_SGLANG
        for name in ("attention_backend", "decode_log_interval", "use_torch_compile", "torch_compile_max_bs")
    },
    **{
        f"rollout.vllm.{name}": _OF_VLLM
        for name in (
            "attention_backend",
            "enable_chunked_prefill",
            "enable_prefix_caching",
            "enable_flash_infer_sampler",
            "max_num_batched_tokens",
        )
    },
    "rollout.vllm.torch_profiler_dir": _vllm(None, "there is no profiler; benchmarks/ measures a step"),
    "rollout.pipeline_parallel_size": _only(1, "an engine has tensor parallelism only (rollout.tensor_parallel_size)"),
    "rollout.validate_weight": _in_vain(False, "a checksum of the weights is compared after every sync"),
    "rollout.validate_save_dir": _only(None, "a checksum of the weights is compared after every sync"),
    "rollout.print_outputs": _in_vain(False, "runner.logger.log_rollouts writes responses to a file"),
    "rollout.cuda_graph_max_bs": _any("graphs are captured for `rollout.max_running_requests` rows"),
    "data.dataset_name": _any("names nothing but the data; `data.train_data_paths` says what is read"),
    "data.validation_shuffle": _any("all problems are validated on, and their order changes nothing"),
    "actor.mcore_gpt": _only(True, "the model is Megatron-core's"),
    "actor.spec_name": _sets("actor.megatron.transformer_impl", *_IMPLS, convert=_IMPLS.__getitem__),
    "actor.offload_optimizer": _in_vain(False, _NO_OFFLOAD),
    "actor.offload_weight": _in_vain(False, _NO_OFFLOAD),
    "actor.offload_grad": _in_vain(False, _NO_OFFLOAD),
    "actor.enable_offload": _in_vain(
        False, f"{_NO_OFFLOAD}; with FSDP2 actor.fsdp_config.cpu_offload=true keeps the state in CPU memory"
    ),
    "actor.enable_dp_load_balance": _in_vain(False, "ranks compute micro-batches of like size together anyway"),
    "actor.calculate_flops": _in_vain(False, "the metric throughput/mfu is in every row"),
    "actor.global_batch_size": _any(
        "follows from `data.rollout_batch_size`, `algorithm.group_size` and `n_minibatches`"
    ),
    "actor.micro_batch_size": _any("follows from `algorithm.training_batch_size_per_gpu`"),
    "actor.model.is_lora": _only(False, "LoRA is not implemented"),
    "actor.model.megatron_checkpoint": _only(
        None, "weights come from actor.model.model_path; resume from a checkpoint with runner.resume_dir"
    ),
    "actor.model.add_bias_linear": _only(False, "models are Llama and Qwen, as actor.model.model_path says"),
    "actor.model.activation": _only("swiglu", "models are Llama and Qwen, as actor.model.model_path says"),
    "actor.model.normalization": _only("rmsnorm", "models are Llama and Qwen, as actor.model.model_path says"),
    "actor.model.position_embedding_type": _only("rope", "models are Llama and Qwen, as actor.model.model_path says"),
    "actor.model.recompute_method": _only(
        "block", "the first actor.megatron.recompute_num_layers layers are recomputed, each by itself", None
    ),
    "actor.model.recompute_num_layers": _sets("actor.megatron.recompute_num_layers"),
    "actor.model.seq_length": _sets("runner.seq_length"),
    "actor.model.encoder_seq_length": _sets("runner.seq_length"),
    "actor.model.apply_rope_fusion": _in_vain(False, _NOT_FUSED),
    "actor.model.bias_dropout_fusion": _in_vain(False, _NOT_FUSED),
    "actor.model.persist_layer_norm": _in_vain(False, _NOT_FUSED),
    "actor.model.bias_activation_fusion": _in_vain(False, _NOT_FUSED),
    "actor.model.gradient_accumulation_fusion": _in_vain(False, _NOT_FUSED),
    "actor.model.attention_softmax_in_fp32": _only(True, "attention takes its softmax in float32"),
    "actor.model.batch_p2p_comm": _in_vain(False, "there is no pipeline parallelism"),
    "actor.model.variable_seq_lengths": _in_vain(True, "nothing is padded to runner.seq_length"),
    "actor.model.moe_token_dispatcher_type": _any("models have no experts"),
    "actor.model.use_cpu_initialization": _any("no weight is initialized: all are read from `actor.model.model_path`"),
    "actor.optim.optimizer": _only("adam", "the optimizer is AdamW"),
    "actor.optim.bf16": _any("must be true where `actor.model.precision` is bf16, and false elsewhere"),
    "actor.optim.fp16": _any("must be true where `actor.model.precision` is fp16, and false elsewhere"),
    "actor.optim.use_distributed_optimizer": _only(True, "ranks always share the optimizer's state"),
    "actor.optim.overlap_grad_reduce": _in_vain(False, _NO_OVERLAP),
    "actor.optim.overlap_param_gather": _in_vain(False, _NO_OVERLAP),
    "actor.optim.overlap_param_gather_with_optimizer_step": _in_vain(False, _NO_OVERLAP),
    "actor.optim.optimizer_enable_pin": _in_vain(False, "pinned memory is for offloading, which is not there"),
    "actor.optim.loss_scale": _sets("actor.megatron.loss_scale", convert=float),
    "actor.optim.loss_scale_window": _sets("actor.megatron.loss_scale_window"),
    f"{RATE}.lr_decay_style": _sets("actor.optim.lr_scheduler", "constant", "linear", "cosine"),
    f"{RATE}.lr_decay_iters": _sets("actor.optim.total_training_steps"),
    f"{RATE}.lr_warmup_iters": _any("sets `actor.optim.lr_warmup_steps`, unless there is a lr_warmup_fraction"),
    f"{RATE}.lr_warmup_fraction": _any("sets `actor.optim.lr_warmup_steps` to this part of lr_decay_iters, rounded up"),
    f"{RATE}.lr_warmup_init": _only(0.0, "the learning rate rises from 0", 0),
    f"{RATE}.max_lr": _sets("actor.optim.lr"),
    f"{RATE}.min_lr": _any("the same as `actor.optim.min_lr`; with lr_decay_style constant any"),
    f"{_FSDP}.sharding_strategy": _only("full_shard", "parameters, gradients and optimizer state are sharded"),
    f"{_FSDP}.offload_pin_memory": _in_vain(False, "pinned memory is not used"),
    f"{_FSDP}.enable_gradient_accumulation": _any(f"`{_FSDP}.virtual_ranks` decides how often gradients are reduced"),
    f"{_FSDP}.forward_prefetch": _in_vain(False, "prefetching is left to torch"),
    f"{_FSDP}.limit_all_gathers": _in_vain(False, "prefetching is left to torch"),
    f"{_FSDP}.backward_prefetch": _in_vain(None, "prefetching is left to torch"),
    f"{_FSDP}.use_orig_params": _any("parameters have the model's names in every file"),
    f"{_FSDP}.use_liger_kernel": _in_vain(False, _NOT_FUSED),
    f"{_FSDP}.mixed_precision.buffer_dtype": _only("fp32", "buffers keep their own type", None),
    f"{_FSDP}.amp_autocast.enabled": _only(False, f"layers compute in {_FSDP}.mixed_precision.param_dtype"),
    f"{_FSDP}.amp_autocast.precision": _any("is for `amp_autocast.enabled: true`, which is refused"),
    "actor.tokenizer.use_fast": _any("transformers has one tokenizer per model, and its tokens are the same"),
    "actor.tokenizer.trust_remote_code": _any("code in a directory is never run; one that needs it is refused"),
    "actor.tokenizer.padding_side": _any("nothing is padded"),
    "actor.megatron.ddp_bucket_size": _in_vain(None, "there is one bucket of gradients"),
    "actor.megatron.distributed_backend": _sets(
        "cluster.device", "nccl", "gloo", convert={"nccl": "cuda", "gloo": "cpu"}.__getitem__
    ),
    "actor.megatron.distributed_timeout_minutes": _sets("runner.hang_timeout", convert=lambda minutes: minutes * 60.0),
    "actor.megatron.use_dist_ckpt": _only(False, "checkpoints have ckpt_format torch"),
    "actor.megatron.tp_comm_bootstrap_backend": _any("is for `tp_comm_overlap_cfg`, which has no effect"),
    "actor.megatron.tp_comm_overlap_cfg": _in_vain(None, _NO_OVERLAP),
    "actor.megatron.use_hf_ckpt": _only(True, "weights come from a Hugging Face directory"),
    "actor.megatron.use_profiler": _only(False, "there is no profiler; benchmarks/ measures a step"),
    "actor.megatron.ckpt_convertor.hf_model_path": _sets("actor.model.model_path"),
    **{
        f"actor.megatron.ckpt_convertor.{name}": _OF_CONVERTER
        for name in (
            "model",
            "save_path",
            "use_gpu_num",
            "use_gpu_index",
            "process_num",
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
        )
    },
    **{
        f"actor.megatron.profiler.{name}": _OF_PROFILER
        for name in (
            "output_dir",
            "activities",
            "record_shapes",
            "profile_memory",
            "with_stack",
            "with_flops",
            "with_modules",
            "export_tensorboard",
            "export_chrome_trace",
            "chrome_filename_prefix",
            "schedule_warmup",
            "schedule_active",
            "schedule_repeat",
        )
    },
    "reward.tokenizer.tokenizer_model": _sets("actor.tokenizer.tokenizer_model"),
    "reward.tokenizer.use_fast": _any("as `actor.tokenizer.use_fast`"),
    "reward.tokenizer.trust_remote_code": _any("as `actor.tokenizer.trust_remote_code`"),
    "reward.tokenizer.padding_side": _any("nothing is padded"),
}
