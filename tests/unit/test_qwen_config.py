"""The shipped GPU configs as far as a CPU can prove them: models on meta, batch arithmetic, and the sums of memory in
their comments, which are made anew here from the numbers in the config."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import PretrainedConfig, Qwen2Config, Qwen3Config

from rlinf_lite.cluster.placement import parse
from rlinf_lite.config import Config
from rlinf_lite.models import build, head, shard
from rlinf_lite.runner.schedule import total_steps, total_updates
from rlinf_lite.ties import tied_names
from rlinf_lite.training.batch import arrange, rows_by_number
from rlinf_lite.training.ranks import data_parallel_size

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("qwen*.yaml"))

_QWEN3 = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
MODELS: dict[str, tuple[PretrainedConfig, int]] = {
    "Qwen2.5-1.5B": (
        Qwen2Config(
            vocab_size=151936,
            num_hidden_layers=28,
            hidden_size=1536,
            intermediate_size=8960,
            num_attention_heads=12,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
        1_543_714_304,
    ),
    "Qwen2.5-7B": (
        Qwen2Config(
            vocab_size=152064,
            num_hidden_layers=28,
            hidden_size=3584,
            intermediate_size=18944,
            num_attention_heads=28,
            num_key_value_heads=4,
            tie_word_embeddings=False,
        ),
        7_615_616_512,
    ),
    "Qwen3-0.6B": (
        Qwen3Config(
            **_QWEN3,
            num_hidden_layers=28,
            hidden_size=1024,
            intermediate_size=3072,
            num_attention_heads=16,
            tie_word_embeddings=True,
        ),
        596_049_920,
    ),
    "Qwen3-1.7B": (
        Qwen3Config(
            **_QWEN3,
            num_hidden_layers=28,
            hidden_size=2048,
            intermediate_size=6144,
            num_attention_heads=16,
            tie_word_embeddings=True,
        ),
        1_720_574_976,
    ),
    "Qwen3-8B": (
        Qwen3Config(
            **_QWEN3,
            num_hidden_layers=36,
            hidden_size=4096,
            intermediate_size=12288,
            num_attention_heads=32,
            tie_word_embeddings=False,
        ),
        8_190_735_360,
    ),
}
"""As in the models' config.json, with how many parameters each has."""

GB = 1e9
ENGINE_WORK_SPACE = 2.0
"""GB that vLLM takes for activations, besides weights and cache: an assumption."""


def model_of(config: Config) -> tuple[PretrainedConfig, int]:
    return MODELS[Path(config.actor.model.model_path).name]


def num_ranks(config: Config) -> int:
    return len(parse(config.cluster.component_placement, 0).slots["actor"])


def num_groups(config: Config) -> int:
    """Ranks that compute different micro-batches."""
    return data_parallel_size(num_ranks(config), config.actor.megatron.tensor_model_parallel_size)


def step_line(config: Config) -> str:
    algorithm, prompts, ranks = config.algorithm, config.data.rollout_batch_size, num_groups(config)
    rows = prompts * algorithm.group_size
    mini = rows // algorithm.n_minibatches
    micros = mini // algorithm.training_batch_size_per_gpu
    return (
        f"# A step: {prompts} prompts x {algorithm.group_size} responses = {rows} rows -> {algorithm.n_minibatches} "
        f"mini-batches of {mini} -> {micros} micro-batches of {algorithm.training_batch_size_per_gpu}, "
        f"{micros // ranks} per rank."
    )


def memory(config: Config) -> list[tuple[float, str]]:
    """What fills a GPU at the worst moment, the backward pass of rows of full length: (GB, why)."""
    training = megatron_memory if config.actor.training_backend == "megatron" else training_memory
    return [*training(config), *rollout_memory(config)]


def training_memory(config: Config) -> list[tuple[float, str]]:
    model, params = model_of(config)
    layers, hidden, inner, vocab = (
        model.num_hidden_layers,
        model.hidden_size,
        model.intermediate_size,
        model.vocab_size,
    )
    ranks, micro, length = num_ranks(config), config.algorithm.training_batch_size_per_gpu, config.runner.seq_length
    ends = vocab * hidden * (1 if model.tie_word_embeddings else 2)
    return [
        (
            params * 16 / ranks / GB,
            f"parameters, gradients, first and second moments, fp32: {params / GB:.2f}e9 x 16 B / {ranks}",
        ),
        (
            ends * 8 / GB,
            f"embedding and head gathered in bf16, their gradient in bf16 and fp32: {ends / GB:.2f}e9 x 8 B",
        ),
        # tests/unit/training/test_head_memory.py counts the bytes.
        (
            head.MAX_ELEMENTS_CUDA * 13 / GB,
            f"a chunk of logits, in bf16 and fp32, with their gradient: {head.MAX_ELEMENTS_CUDA / 1e6:.1f}e6 x 13 B",
        ),
        (head.MAX_KEPT_BYTES / GB, "logits of other chunks, kept for the backward pass"),
        (
            micro * length * (layers * hidden + 4 * inner + 12 * hidden) * 2 / GB,
            f"activations, checkpointed: {micro} x {length} tokens x "
            f"({layers} x {hidden} + 4 x {inner} + 12 x {hidden}) x 2 B",
        ),
    ]


def megatron_memory(config: Config) -> list[tuple[float, str]]:
    model, params = model_of(config)
    layers, hidden, inner = model.num_hidden_layers, model.hidden_size, model.intermediate_size
    tensor, groups = config.actor.megatron.tensor_model_parallel_size, num_groups(config)
    micro, length = config.algorithm.training_batch_size_per_gpu, config.runner.seq_length
    ends, kind = model.vocab_size * hidden, config.actor.model.precision
    assert config.actor.megatron.sequence_parallel, "layers' inputs are divided"
    return [
        (params * 6 / tensor / GB, f"parameters in {kind}, gradients in fp32: {params / GB:.2f}e9 x 6 B / {tensor}"),
        (
            params * 12 / tensor / groups / GB,
            f"the optimizer's parameters, first and second moments, fp32: {params / GB:.2f}e9 x 12 B / {tensor} / "
            f"{groups}",
        ),
        (
            ends * 8 / tensor / GB,
            f"gradient of the head, fp32 and {kind}, twice {kind}: {ends / GB:.2f}e9 x 8 B / {tensor}",
        ),
        (
            head.MAX_ELEMENTS_CUDA * 13 / GB,
            f"a chunk of logits, in {kind} and fp32, with their gradient: {head.MAX_ELEMENTS_CUDA / 1e6:.1f}e6 x 13 B",
        ),
        (
            micro * length * ((layers * hidden + 4 * inner) // tensor + 12 * hidden) * 2 / GB,
            f"activations, recomputed: {micro} x {length} tokens x "
            f"(({layers} x {hidden} + 4 x {inner}) / {tensor} + 12 x {hidden}) x 2 B",
        ),
    ]


def rollout_precision(config: Config) -> str:
    assert config.rollout.model.precision in ("bf16", "fp16"), "of 2 bytes"
    return config.rollout.model.precision


def rollout_memory(config: Config) -> list[tuple[float, str]]:
    model, params = model_of(config)
    head_dim = model.hidden_size // model.num_attention_heads if model.model_type == "qwen2" else model.head_dim
    a_token = 2 * model.num_hidden_layers * model.num_key_value_heads * head_dim * 2
    rows, length = config.rollout.max_running_requests, config.runner.seq_length
    weights, cache = params * 2 / GB, config.rollout.kv_cache_gb
    if config.rollout.rollout_backend == "builtin":
        return [
            (weights, f"weights of the rollout model in {rollout_precision(config)}: {params / GB:.2f}e9 x 2 B"),
            (rows * length * a_token / GB, f"its cache: {rows} rows x {length} tokens x {a_token // 1024} KiB"),
        ]
    assert cache is not None and config.rollout.tensor_parallel_size == 1
    rows = int(cache * GB / a_token / length)
    return [
        (
            weights + ENGINE_WORK_SPACE + cache,
            f"vLLM: weights {weights:.1f}, work space {ENGINE_WORK_SPACE:.0f}, "
            f"cache {cache:.1f} = {rows} rows at {a_token // 1024} KiB per token",
        )
    ]


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def config(shipped_config, name):
    return shipped_config(name)


def comment(name: str) -> list[str]:
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    return [line for line in lines[: lines.index("defaults:")] if line.startswith("#")]


@pytest.mark.parametrize("model", MODELS)
def test_models_on_meta(model):
    architecture, num_params = MODELS[model]
    built = build.build_on_meta(architecture, "fp32")
    assert all(param.is_meta for param in built.parameters())
    assert sum(param.numel() for param in built.parameters()) == num_params
    assert len(shard.blocks(built)) == architecture.num_hidden_layers
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if architecture.tie_word_embeddings else {}
    assert tied_names(built) == tied


def test_memory_comment(name, config):
    """Where this fails, the comment is wrong: paste what is expected."""
    gpu = int(re.search(r"of (\d+): the rest", "\n".join(comment(name))).group(1))
    parts = memory(config)
    total = sum(size for size, _ in parts)
    expected = [
        step_line(config),
        "# Memory in GB per GPU:",
        *(f"#   {size:5.1f}  {why}" for size, why in parts),
        f"#   {total:5.1f}  of {gpu}: the rest is for CUDA, NCCL and fragmentation",
    ]
    assert comment(name)[-len(expected) :] == expected
    assert total < 0.9 * gpu


def test_a_step_divides_evenly(config):
    algorithm, ranks = config.algorithm, num_groups(config)
    rows = config.data.rollout_batch_size * algorithm.group_size
    minibatches = arrange(rows, 1, num_minibatches=algorithm.n_minibatches, shuffle_seed=None)
    units = rows_by_number(minibatches[0], algorithm.training_batch_size_per_gpu)
    assert len(units) % ranks == 0
    assert sorted(row for minibatch in minibatches for row in minibatch) == list(range(rows))
    assert rows % (algorithm.logprob_forward_micro_batch_size * ranks) == 0


def test_names_say_what_they_are(name, config):
    assert f"bash run_main_math.sh {name} " in "\n".join(comment(name))
    assert config.algorithm.sampling_params.max_new_tokens == config.runner.seq_length - config.data.max_prompt_length
    if gpus := re.search(r"-(\d+)gpu$", name):
        assert (num_ranks(config), config.runner.experiment_name) == (int(gpus.group(1)), name)
        assert config.cluster.num_nodes == max(1, num_ranks(config) // 8)
        assert name.startswith(Path(config.actor.model.model_path).name.lower())


def test_the_engine_is_compared_with_the_trainer(config):
    """Other kernels give other log-probs: they must be reported, recomputed, and weighed in."""
    if config.rollout.rollout_backend == "vllm":
        fixed = (config.rollout.return_logprobs, config.algorithm.recompute_logprobs)
        assert (*fixed, config.algorithm.importance_sampling_fix) == (True, True, True)


def test_schedule_of_the_first_config(shipped_config):
    config = shipped_config("qwen2.5-1.5b-grpo-fsdp")
    steps = total_steps(config.runner, num_problems=106_000, batch=config.data.rollout_batch_size)
    assert steps == 5 * 106_000 // 128
    assert total_updates(config.actor.optim, steps, config.algorithm.n_minibatches) == 4 * steps
