"""Old log-probs both ways: the builtin engine's, and those of a pass of the sharded policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlinf_lite.models import hf_directory
from rlinf_lite.rollout.builtin import BuiltinEngine
from rlinf_lite.training.batch import SplitSettings, StepBatch, StepRows
from rlinf_lite.types import GenerationBatch, Group, Problem, Prompt, Sampling

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ((3, 7, 11), (5,), (9, 2, 30, 31, 8, 6, 14))
NOT_GRADED = (1, 6)


LLAMA = {
    "vocab_size": 37,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
GPT2 = {"vocab_size": 37, "n_embd": 48, "n_layer": 2, "n_head": 3, "bos_token_id": None, "eos_token_id": None}
FAMILIES = {"llama": LLAMA, "qwen3": LLAMA, "gpt2": {**GPT2, "initializer_range": 0.2}}
"""With sizes for which `recovery.logprobs` lets old log-probs come from the engine."""


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, sizes in FAMILIES.items():
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes)).save_pretrained(root / name)
    return {name: str(root / name) for name in FAMILIES}


@pytest.fixture
def sampled(model_dirs):
    """``sampled(name)``: four responses per prompt at temperature 0.7, some of them truncated."""

    def generate(name: str) -> list[Group]:
        tokenizer = hf_directory.load_tokenizer(hf_directory.resolve("embedded:tiny-arithmetic"))
        model = AutoModelForCausalLM.from_pretrained(Path(model_dirs[name]), dtype=torch.float32)
        ends = frozenset(range(4))
        engine = BuiltinEngine(model, tokenizer, eos_ids=ends, return_logprobs=True, max_rows=5)
        prompts = tuple(
            Prompt(
                prompt_index=index,
                epoch=0,
                problem=Problem(problem_id=index, prompt="", answer="", prompt_ids=ids, source=""),
            )
            for index, ids in enumerate(PROMPTS)
        )
        sampling = Sampling(
            do_sample=True, temperature=0.7, top_k=20, top_p=0.95, repetition_penalty=1.1, max_new_tokens=14
        )
        batch = GenerationBatch(
            stream="train", step=1, index=0, prompts=prompts, group_size=4, sampling=sampling, seed=5
        )
        return engine.generate(batch)

    return generate


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_they_are_equal(ranks, sampled, model_dirs, make_config, name, world_size):
    groups = sampled(name)
    responses = [response for group in groups for response in group.responses]
    assert len({response.finished for response in responses}) == 2, "some are truncated, some are not"
    config = make_config({"algorithm.n_minibatches": 2})
    config.algorithm.sampling_params.temperature = 0.7
    given = {"model_dir": model_dirs[name], "config": config, "groups": groups, "left_out": NOT_GRADED}
    of_a_pass = ranks.run(world_size, "logprobs", reference=False, **given)[0]["whole"]
    counted = [row not in NOT_GRADED for row in range(len(responses))]
    settings = SplitSettings.of(config.algorithm, config.runner, seed=0)
    of_the_engine = StepBatch(StepRows(groups, step=1, settings=settings), counted).engine_logprobs()
    assert torch.equal(of_a_pass, of_the_engine) and of_the_engine.std() > 0.1
