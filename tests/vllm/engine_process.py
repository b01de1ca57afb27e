"""An engine over a tiny model, batches for it, and its answers as bits.

As a script, in its own process, it reads a job as JSON from stdin and writes the result of each batch.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlinf_lite import numerics
from rlinf_lite.config import RolloutConfig, RolloutModelConfig, SamplingConfig
from rlinf_lite.models import build, hf_directory, vocabulary
from rlinf_lite.rollout.vllm_engine import VllmEngine
from rlinf_lite.types import GenerationBatch, Group, Problem, Prompt, Sampling
from rlinf_lite.weights.names import named_weights, weight_shapes

EMBEDDED = "embedded:tiny-arithmetic-2heads"


def load_model(path: str = EMBEDDED, precision: str = "fp32", seed: int | None = None) -> PreTrainedModel:
    """The model as the trainer has it. With a seed: other weights, far from the stored ones."""
    model = AutoModelForCausalLM.from_pretrained(hf_directory.resolve(path), dtype=build.DTYPES[precision]).eval()
    if seed is not None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_engine(path: str = EMBEDDED, *, temperature: float = 1.0, seq_length: int = 64, **settings: Any) -> VllmEngine:
    numerics.fix("cpu")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    model_dir = hf_directory.resolve(path)
    precision = settings.pop("precision", "fp32")
    tokenizer = hf_directory.load_tokenizer(hf_directory.resolve(EMBEDDED))
    return VllmEngine(
        RolloutConfig(
            rollout_backend="vllm",
            model=RolloutModelConfig(precision=precision),
            **{"max_running_requests": 64, "return_logprobs": True, **settings},
        ),
        tokenizer,
        model_dir=model_dir,
        shapes=weight_shapes(build.build_on_meta(hf_directory.load_config(model_dir, None), precision)),
        eos_ids=vocabulary.eos_ids(hf_directory.resolve(EMBEDDED), tokenizer),
        seq_length=seq_length,
        sampling=SamplingConfig(temperature=temperature),
        device=torch.device("cpu"),
    )


def pieces(model: PreTrainedModel) -> list[tuple[str, int, torch.Tensor]]:
    return [(name, 0, tensor.detach()) for name, tensor in named_weights(model)]


def make_batch(
    prompts: list[list[int]],
    *,
    first: int = 0,
    stream: str = "train",
    step: int = 1,
    group_size: int = 1,
    **sampling: Any,
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
        seed=5,
    )


class Row(NamedTuple):
    """A response with its prompt."""

    prompt_index: int
    sample_index: int
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    logprobs: np.ndarray | None
    finished: bool
    text: str


def flat(groups: list[Group]) -> list[Row]:
    """The responses of all groups, in order."""
    return [
        Row(
            group.prompt.prompt_index,
            response.sample_index,
            np.array(group.prompt.problem.prompt_ids),
            response.token_ids,
            response.logprobs,
            response.finished,
            response.text,
        )
        for group in groups
        for response in group.responses
    ]


def bits(rollouts: list[Row]) -> list[Any]:
    return [
        [
            r.prompt_index,
            r.sample_index,
            r.response_ids.tolist(),
            None if r.logprobs is None else r.logprobs.tobytes().hex(),
        ]
        for r in rollouts
    ]


def sums(*texts: str) -> list[list[int]]:
    tokenizer = hf_directory.load_tokenizer(hf_directory.resolve(EMBEDDED))
    return [tokenizer(text)["input_ids"] for text in texts]


def main() -> None:
    job = json.load(sys.stdin)
    engine = make_engine(**job.get("engine", {}))
    precision = job.get("engine", {}).get("precision", "fp32")
    engine.load_weights(pieces(load_model(precision=precision, **job.get("model", {}))))
    made = [bits(flat(engine.generate(make_batch(**batch)))) for batch in job["batches"]]
    output = Path(job["output"])
    unfinished = output.with_suffix(".tmp")
    unfinished.write_text(json.dumps(made))
    unfinished.replace(output)
    if job.get("wait_for_signal"):
        signal.pause()
    engine.close()


if __name__ == "__main__":
    main()
