"""On a GPU in bf16: the engine's log-probs are the trainer's, and neither graphs nor what runs together change a bit.

On a CPU the same tests run with smaller models and without graphs, which shows that the tests themselves work.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlinf_lite.models import hf_directory
from rlinf_lite.models.scored import ScoredModel
from rlinf_lite.models.segments import FlatTokens
from rlinf_lite.rollout import device_decoder
from rlinf_lite.rollout.builtin import BuiltinEngine
from rlinf_lite.training.batch import SplitSettings, StepBatch, StepRows
from rlinf_lite.types import GenerationBatch, Group, Problem, Prompt, Sampling

ON_GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
)
SIZES = {
    "cuda": {"vocab_size": 32_000, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 3},
    "cpu": {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2},
}
HEADS = {"max_position_embeddings": 2048, "pad_token_id": 0, "initializer_range": 0.05}
FAMILIES = {
    "qwen2": {"num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64},
    "qwen3": {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
    "llama": {"num_attention_heads": 14, "num_key_value_heads": 14, "head_dim": 64},
    "mistral": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "sliding_window": 50},
}
ENDS = {"cuda": frozenset(range(0, 32_000, 40)), "cpu": frozenset(range(3, 8))}
"""So that a response ends after some 40 tokens, or 60."""


def model_of(family: str, device: torch.device):
    torch.manual_seed(3)
    sizes = {**SIZES[device.type], **HEADS, **FAMILIES[family]}
    if device.type == "cpu":
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), dtype=torch.bfloat16).to(device)


def engine_of(model, *, max_rows: int) -> BuiltinEngine:
    tokenizer = hf_directory.load_tokenizer(hf_directory.resolve("embedded:tiny-arithmetic"))
    ends = ENDS[model.device.type]
    return BuiltinEngine(copy.deepcopy(model), tokenizer, eos_ids=ends, return_logprobs=True, max_rows=max_rows)


def batch_of(device: str, *, prompts: range = range(9), step: int = 1, **options) -> GenerationBatch:
    """Prompts of 3 to 155 tokens, responses of up to 150."""
    made = [tuple(9 + (7 * i + 3 * j) % 200 for j in range(3 + 19 * i)) for i in prompts]
    plain = {"do_sample": True, "temperature": 0.9, "top_k": -1, "top_p": 1.0, "repetition_penalty": 1.0}
    sampling = Sampling(**{**plain, "max_new_tokens": 150 if device == "cuda" else 12, **options})
    problems = [
        Problem(problem_id=i, prompt="", answer="", prompt_ids=ids, source="made") for i, ids in enumerate(made)
    ]
    given = tuple(Prompt(prompt_index=i, epoch=0, problem=of_i) for i, of_i in zip(prompts, problems, strict=True))
    return GenerationBatch(stream="train", step=step, index=0, prompts=given, group_size=8, sampling=sampling, seed=5)


def found(groups: list[Group]) -> list[tuple[list[int], bytes]]:
    return [(r.token_ids.tolist(), r.logprobs.tobytes()) for group in groups for r in group.responses]


def trainer_logprobs(model, groups: list[Group], rows_per_unit: int, temperature: float, device) -> np.ndarray:
    settings = SplitSettings(
        num_minibatches=1, shuffle_seed=None, rows_for_forward=rows_per_unit, rows_for_update=1, max_tokens=None
    )
    root, made = ScoredModel(copy.deepcopy(model)), []
    num = sum(len(group.responses) for group in groups)
    for unit in StepBatch(StepRows(groups, step=1, settings=settings), [True] * num).for_forward():
        tokens = FlatTokens.of(unit.ids_N, unit.positions_N, unit.segments, device)
        given = tokens.ids_N, tokens.positions_N, tokens.layout, unit.source_M.to(device), unit.targets_M.to(device)
        with torch.no_grad():
            made.append(root(*given, temperature, False)[0].cpu())
    return torch.cat(made).numpy()


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.soak), ON_GPU])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_the_trainers(fixed_kernels, device, family):
    """Rows leave and join; the trainer computes groups together, and responses by the hundred or alone."""
    where = fixed_kernels(device)
    model = model_of(family, where)
    groups = engine_of(model, max_rows=40).generate(batch_of(device))
    logprobs = np.concatenate([r.logprobs for group in groups for r in group.responses])
    assert logprobs.std() > 0.1 and len({len(r.token_ids) for group in groups for r in group.responses}) > 3
    for rows_per_unit in (100, 8, 1):
        assert np.array_equal(logprobs, trainer_logprobs(model, groups, rows_per_unit, 0.9, where))


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.soak), ON_GPU])
@pytest.mark.parametrize("options", [{}, {"do_sample": False}, {"top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1}])
def test_graphs_and_the_rows_of_a_batch_change_nothing(fixed_kernels, device, options, monkeypatch):
    model = model_of("qwen2", fixed_kernels(device))
    engine = engine_of(model, max_rows=128)
    batch = batch_of(device, **options)
    whole = found(engine.generate(batch))
    assert found(engine.generate(batch)) == whole
    for max_rows in (16, 5):
        assert found(engine_of(model, max_rows=max_rows).generate(batch)) == whole
    parts = [engine.generate(batch_of(device, prompts=range(i, i + 3), **options)) for i in (0, 3, 6)]
    assert [row for part in parts for row in found(part)] == whole
    monkeypatch.setattr(device_decoder, "_get_current_dispatch_mode", lambda: "so without graphs")
    assert found(engine.generate(batch)) == whole


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.soak), ON_GPU])
def test_new_weights_are_used_by_graphs_that_exist(fixed_kernels, device):
    model = model_of("qwen2", fixed_kernels(device))
    engine, batch = engine_of(model, max_rows=128), batch_of(device)
    before = found(engine.generate(batch))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.01)
    for name, weight in model.named_parameters():
        engine._targets[name].copy_(weight)
    after = found(engine.generate(batch))
    assert after != before and after == found(engine_of(model, max_rows=128).generate(batch))
