"""An engine over a tiny model, and batches for it."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlinf_lite.models import hf_directory, vocabulary
from rlinf_lite.rollout.builtin import BuiltinEngine
from rlinf_lite.types import GenerationBatch, Problem, Prompt, Sampling

COMMON = {
    "vocab_size": 41,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": COMMON,
    "gpt2": {"vocab_size": 41, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3},
    "qwen3": COMMON,
    "gemma2": {**COMMON, "sliding_window": 6},
}


@pytest.fixture(scope="session")
def embedded():
    """The embedded default: ``model``, ``tokenizer`` and ``eos_ids``."""
    path = hf_directory.resolve("embedded:tiny-arithmetic")
    tokenizer = hf_directory.load_tokenizer(path)
    return SimpleNamespace(
        model=AutoModelForCausalLM.from_pretrained(path).eval(),
        tokenizer=tokenizer,
        eos_ids=vocabulary.eos_ids(path, tokenizer),
    )


@pytest.fixture(scope="session")
def random_model():
    def make(model_type: str):
        torch.manual_seed(11)
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **CONFIGS[model_type]), dtype=torch.float32
        ).eval()

    return make


@pytest.fixture
def make_engine(embedded):
    def make(model=None, *, eos_ids=None, return_logprobs=False, max_rows=512) -> BuiltinEngine:
        return BuiltinEngine(
            copy.deepcopy(model or embedded.model),
            embedded.tokenizer,
            eos_ids=embedded.eos_ids if eos_ids is None else frozenset(eos_ids),
            return_logprobs=return_logprobs,
            max_rows=max_rows,
        )

    return make


@pytest.fixture(scope="session")
def make_batch():
    def make(
        prompts: list[list[int]],
        *,
        first: int = 0,
        stream: str = "train",
        step: int = 1,
        seed: int = 5,
        group_size: int = 1,
        **sampling,
    ) -> GenerationBatch:
        """``prompts`` are token ids; their prompt indices count from ``first``."""
        plain = {"do_sample": True, "temperature": 1.0, "top_k": -1, "top_p": 1.0, "repetition_penalty": 1.0}
        return GenerationBatch(
            stream=stream,
            step=step,
            index=0,
            prompts=tuple(
                Prompt(
                    prompt_index=first + i,
                    epoch=0,
                    problem=Problem(problem_id=i, prompt="", answer="", prompt_ids=tuple(ids), source="made"),
                )
                for i, ids in enumerate(prompts)
            ),
            group_size=group_size,
            sampling=Sampling(**{**plain, "max_new_tokens": 6, **sampling}),
            seed=seed,
        )

    return make
