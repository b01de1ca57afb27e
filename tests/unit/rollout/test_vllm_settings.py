"""Settings of vLLM, tested without it; tests/vllm tests the engine itself."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rlinf_lite.config import ConfigError, RolloutConfig, RolloutModelConfig, SamplingConfig, build
from rlinf_lite.config.compose import load
from rlinf_lite.config.rules import check
from rlinf_lite.config.versions import vllm_version
from rlinf_lite.models.embedded import make_tiny_arithmetic
from rlinf_lite.rollout import vllm_setup

BASE = {
    "runner": {"experiment_name": "x", "max_steps": 1},
    "actor": {"model": {"model_path": "embedded:tiny-arithmetic-2heads"}},
    "data": {"type": "arithmetic"},
    "cluster": {"device": "cuda"},
}


def problems(rollout: dict, sampling: dict | None = None, device: str = "cuda") -> str:
    raw = {**BASE, "rollout": rollout, "algorithm": {"sampling_params": sampling or {}}, "cluster": {"device": device}}
    try:
        check(build(raw))
    except ConfigError as error:
        return str(error)
    return ""


def arguments(sampling: SamplingConfig | None = None, device: str = "cpu", **settings):
    settings = {"rollout_backend": "vllm", "model": RolloutModelConfig(precision="bf16"), **settings}
    return vllm_setup.engine_arguments(
        RolloutConfig(**settings),
        model_dir=Path("/models/x"),
        seq_length=96,
        sampling=sampling or SamplingConfig(),
        device=torch.device(device),
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gpu_memory_utilization", 0.5),
        ("kv_cache_gb", 0.5),
        ("enforce_eager", False),
        ("tensor_parallel_size", 2),
        ("enable_sleep", True),
        ("batch_invariant", True),
    ],
)
def test_keys_of_vllm_need_vllm(key, value):
    assert f"rollout.{key}={str(value).lower()}: is for vLLM only" in problems({key: value})
    assert problems({key: value, "rollout_backend": "vllm"}, device="auto") == ""


@pytest.mark.parametrize(
    ("rollout", "found"),
    [
        ({"gpu_memory_utilization": 1.5}, "rollout.gpu_memory_utilization=1.5"),
        ({"gpu_memory_utilization": 0.0}, "rollout.gpu_memory_utilization=0.0"),
        ({"kv_cache_gb": 0.0}, "rollout.kv_cache_gb=0.0"),
        ({"kv_cache_gb": 1.0, "gpu_memory_utilization": 0.5}, "set one of them to null"),
        ({"tensor_parallel_size": 0}, "rollout.tensor_parallel_size=0"),
    ],
)
def test_invalid_values(rollout, found):
    assert found in problems({"rollout_backend": "vllm", **rollout})


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_tensor_parallelism_is_for_any_device(device):
    assert problems({"rollout_backend": "vllm", "tensor_parallel_size": 2}, device=device) == ""


@pytest.mark.parametrize("key", ["enable_sleep", "batch_invariant"])
def test_gpu_features_are_refused_on_a_cpu(key):
    assert f"rollout.{key}=true: vLLM can do that on GPUs only" in problems(
        {"rollout_backend": "vllm", key: True}, device="cpu"
    )


@pytest.mark.parametrize("filter_", [{"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 20}, {"repetition_penalty": 1.1}])
def test_logprobs_that_vllm_cannot_report(filter_):
    """With a temperature it has only those after the filter; at 1 it has those before."""
    rollout = {"rollout_backend": "vllm", "return_logprobs": True}
    assert "rollout.return_logprobs=true" in problems(rollout, {"temperature": 0.8, **filter_})
    assert problems(rollout, {"temperature": 1.0, **filter_}) == ""
    assert problems(rollout, {"temperature": 0.8}) == ""
    assert problems({"rollout_backend": "vllm"}, {"temperature": 0.8, **filter_}) == ""


@pytest.mark.parametrize("temperature", [0.005, 2.5])
def test_temperatures_that_vllm_refuses_or_changes(temperature):
    found = problems({"rollout_backend": "vllm"}, {"temperature": temperature})
    assert f"algorithm.sampling_params.temperature={temperature}: vLLM samples at 0.01 to 2" in found
    assert problems({}, {"temperature": temperature}) == ""


def test_which_logprobs_are_requested():
    assert arguments()["logprobs_mode"] == "raw_logprobs"
    assert arguments(SamplingConfig(temperature=0.7))["logprobs_mode"] == "processed_logprobs"
    assert arguments(SamplingConfig(do_sample=False, temperature=0.7))["logprobs_mode"] == "raw_logprobs"


def test_arguments_follow_the_config():
    made = arguments(max_running_requests=9000, tensor_parallel_size=2)
    assert made["model"] == "/models/x" and made["load_format"] == "dummy"
    assert (made["dtype"], made["max_model_len"], made["max_num_seqs"]) == ("bfloat16", 96, 9000)
    assert made["max_num_batched_tokens"] >= 9000  # vLLM wants room for one token a sequence
    assert (made["tensor_parallel_size"], made["distributed_executor_backend"]) == (2, "mp")
    assert arguments()["distributed_executor_backend"] == "uni"


def test_eager_by_default_on_a_cpu_alone():
    assert [arguments(device=device)["enforce_eager"] for device in ("cpu", "cuda")] == [True, False]
    assert arguments(device="cuda", enforce_eager=True)["enforce_eager"]
    assert not arguments(enforce_eager=False)["enforce_eager"]


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_message_shows_how_to_install_it():
    with pytest.raises(ConfigError, match=r"bash toolkits/vllm/install_cpu\.sh"):
        vllm_version()
    assert (Path(__file__).resolve().parents[3] / "toolkits" / "vllm" / "install_cpu.sh").is_file()


def test_only_the_vllm_engine_imports_vllm(run_forked):
    modules = ", ".join(
        f"rlinf_lite.{name}"
        for name in (
            "cluster.workers.rollout_worker",
            "cluster.workers.warm_up",
            "rollout.build",
            "rollout.builtin",
            "rollout.vllm_setup",
        )
    )
    code = f"import sys, {modules}; print('vllm' in sys.modules, 'rlinf_lite.rollout.vllm_engine' in sys.modules)"
    shown = run_forked("-c", code)
    assert shown.stdout.split() == ["False", "False"], shown.stderr


def test_the_shipped_config_is_the_embedded_default_with_vllm():
    shipped, default = load(["grpo-tiny-arithmetic-vllm"]), load([])
    check(shipped)
    assert shipped.rollout.rollout_backend == "vllm" and shipped.rollout.model.model_path.endswith("-2heads")
    assert (shipped.algorithm, shipped.data, shipped.actor.optim) == (
        default.algorithm,
        default.data,
        default.actor.optim,
    )


def test_its_model_leaves_something_to_learn():
    from transformers import AutoModelForCausalLM

    directory = Path(make_tiny_arithmetic.__file__).parent / "tiny-arithmetic-2heads"
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    assert (model.config.num_attention_heads, model.config.head_dim) == (2, 32)
    sums = make_tiny_arithmetic.Sums(make_tiny_arithmetic.build_tokenizer())
    assert sums.sampled_accuracy(model) == pytest.approx(0.35, abs=0.02)
