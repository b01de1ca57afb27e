"""Kernels are reproducible: per operation, per call, per run, and after a kill.

Each test takes a device and runs on a CPU too, with a smaller model, which shows that the test itself works.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlinf_lite.models import hf_directory
from rlinf_lite.models.scored import ScoredModel
from rlinf_lite.models.segments import FlatTokens
from rlinf_lite.rollout.builtin import BuiltinEngine
from rlinf_lite.selfcheck.twice import Twice
from rlinf_lite.types import GenerationBatch, Group, Problem, Prompt, Sampling, Segments

ON_GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
)
ROWS = {"cpu": 2, "cuda": 16}
"""Prompts of a generation batch; each is answered by 4 rows."""
TRAINED_IDS = torch.randint(3, 20, (4, 65), generator=torch.Generator().manual_seed(2))


def load(path, device: torch.device) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(device)


def batch_for(device: str) -> GenerationBatch:
    """Prompts of 3 and 6 tokens, so that shorter ones are padded."""
    prompts = tuple(
        Prompt(
            prompt_index=index,
            epoch=0,
            problem=Problem(problem_id=index, prompt="", answer="", prompt_ids=(1, *range(3, 3 + size)), source="made"),
        )
        for index, size in enumerate([2, 5] * (ROWS[device] // 2))
    )
    sampling = Sampling(do_sample=True, temperature=1.0, top_k=-1, top_p=1.0, repetition_penalty=1.0, max_new_tokens=12)
    return GenerationBatch(stream="train", step=1, index=0, prompts=prompts, group_size=4, sampling=sampling, seed=5)


def bits(groups: list[Group]) -> list[tuple[list[int], bytes]]:
    responses = [response for group in groups for response in group.responses]
    return [(r.token_ids.tolist(), b"" if r.logprobs is None else r.logprobs.tobytes()) for r in responses]


def gradients(model: ScoredModel, device: torch.device) -> list[Tensor]:
    """Of one unit, as the trainer computes it: sequences end to end, log-probs and an entropy bonus."""
    model.zero_grad()
    rows, length = TRAINED_IDS.shape
    starts = torch.arange(rows) * length
    segments = Segments(start_S=starts, stop_S=starts + length, parent_S=torch.full((rows,), -1))
    tokens = FlatTokens.of(TRAINED_IDS.flatten(), torch.arange(length).repeat(rows), segments, device)
    source = torch.arange(rows * length).view(rows, length)[:, :-1].flatten().to(device)
    logprobs, entropy = model(
        *(tokens.ids_N, tokens.positions_N, tokens.layout, source, tokens.ids_N[source + 1]), 1.0, True
    )
    (logprobs - 0.01 * entropy).mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_every_operation_is_reproducible(device, qwen, fixed_kernels):
    where, path = fixed_kernels(device), qwen(device, 2)
    tokenizer = hf_directory.load_tokenizer(path)
    engine = BuiltinEngine(load(path, where), tokenizer, eos_ids=frozenset({2}), return_logprobs=True, max_rows=64)
    batch = batch_for(device)
    with Twice() as found:
        engine.generate(batch)
    assert not found.differ, f"in the engine: {dict(found.differ)}"
    assert found.seen.total() > 100
    model = ScoredModel(load(path, where).train())
    with Twice() as found:
        gradients(model, where)
    assert not found.differ, f"in the update: {dict(found.differ)}"
    if device == "cuda":
        assert any("attention" in name and "backward" in name for name in found.seen)


def test_an_operation_that_differs_is_found():
    """A random operation is found, and no other."""
    with Twice() as found:
        torch.nn.functional.dropout(torch.ones(1000), 0.5) + torch.ones(1000).cumsum(0)
    assert list(found.differ) == [found.first] and found.seen["cumsum.default"] == 1
    assert not found.differ["cumsum.default"]


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_the_same_call_is_reproducible(device, qwen, fixed_kernels):
    """On two engines, and with other computations between the calls, which leave other values in free memory."""
    where, path = fixed_kernels(device), qwen(device, 4 if device == "cuda" else 1)
    tokenizer = hf_directory.load_tokenizer(path)
    engines = [
        BuiltinEngine(load(path, where), tokenizer, eos_ids=frozenset({2}), return_logprobs=True, max_rows=64)
        for _ in range(2)
    ]
    batch = batch_for(device)
    first = bits(engines[0].generate(batch))
    model = ScoredModel(load(path, where).train())
    grads = gradients(model, where)
    assert bits(engines[0].generate(batch)) == bits(engines[1].generate(batch)) == first
    for _ in range(2):
        again = gradients(model, where)
        assert len(again) == len(grads) and all(torch.equal(a, b) for a, b in zip(again, grads, strict=True))


@pytest.mark.timeout(1200)
@pytest.mark.xdist_group("alone")
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.soak), ON_GPU])
def test_equal_runs_and_a_killed_one(device, qwen, new_run, same_run):
    """bf16 in update and engine. Random weights get no reward, so only the entropy bonus gives a gradient."""
    overrides = {
        "cluster.device": device,
        "cluster.component_placement.actor": "0",
        "cluster.component_placement.rollout": "0",
        "fsdp": "gpu_bf16" if device == "cuda" else "cpu_bf16",
        "actor.model.model_path": str(qwen(device, 4 if device == "cuda" else 1)),
        "rollout.model.precision": "bf16",
        "algorithm.entropy_bonus": "0.01",
        "algorithm.sampling_params.max_new_tokens": "16",
        "runner.seq_length": "32",
    }
    one, two, killed = new_run(overrides), new_run(overrides), new_run(overrides)
    one.finish()
    two.finish()
    assert one.samples()[0] == two.samples()[0], "the first rollouts differ: it is in the engine"
    assert one.rows()[0] == two.rows()[0], "the first update differs, with the same rollouts"
    same_run(one, two, 8)
    killed.kill_when("global_step_3 (")
    killed.finish("runner.resume_dir=auto")
    same_run(one, killed, 8)
