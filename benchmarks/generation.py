"""Tokens per second of the builtin engine: the embedded default, a SmolLM2 shape beside `generate`, uneven lengths.

    python benchmarks/generation.py [embedded | generate | uneven | text ...] [--layers 30] [--rounds 3]
        [--texts FILE.jsonl]

In one process with one thread, without Ray, by its processor time. `embedded` is one step of the default config.
`generate` decodes SmolLM2-135M's shape with random weights, 1, 8 and 32 rows in turns with transformers' `generate`,
greedily. `uneven` samples responses of 1 to 512 tokens to 64 prompts with 16 rows at once: in batches of 16, and in one
batch, where rows join when others finish. `text`, which needs `--texts`, is as `generate`, but the engine draws the
answers of a file like GSM8K's train.jsonl (lines with `question` and `answer`), whatever the logits: with random
weights a greedy text soon repeats itself, and drafts are right more often than those of a real text. To compare two
versions of the project, run the script by turns in two worktrees: it uses no name that only the newer one has.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rlinf_lite import numerics
from rlinf_lite.config import RolloutConfig
from rlinf_lite.config.compose import load
from rlinf_lite.data import load_problems
from rlinf_lite.models import build, hf_directory, vocabulary
from rlinf_lite.rollout.batches import generation_batches, rng_keys
from rlinf_lite.rollout.build import build_engine
from rlinf_lite.rollout.engine import RolloutEngine
from rlinf_lite.types import GenerationBatch, Problem, Prompt, Sampling
from rlinf_lite.weights.names import named_weights, weight_shapes

EMBEDDED = "embedded:tiny-arithmetic"
PROMPT, NEW = 32, 64
"""Tokens of a prompt, and of a response to it beside `generate`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["embedded", "generate", "uneven"])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=Path, help="for `text`")
    options = parser.parse_args()
    numerics.fix("cpu")
    for what in options.what:
        if what == "text":
            replayed(options.layers, options.rounds, options.texts or parser.error("text: give --texts"))
        else:
            {"embedded": embedded, "generate": beside_generate, "uneven": uneven}[what](options.layers, options.rounds)


def embedded(_: int, rounds: int) -> None:
    """A step of the default config."""
    config = load([])
    path = hf_directory.resolve(EMBEDDED)
    tokenizer = hf_directory.load_tokenizer(path)
    source = AutoModelForCausalLM.from_pretrained(path)
    engine = engine_of(source, tokenizer, vocabulary.eos_ids(path, tokenizer), config.rollout.max_running_requests)
    problems = load_problems(config.data, "train", tokenizer).problems[: config.data.rollout_batch_size]
    prompts = [Prompt(prompt_index=p.problem_id, epoch=0, problem=p) for p in problems]
    rows, sampling = config.rollout.max_running_requests, Sampling(**vars(config.algorithm.sampling_params))

    def step(number: int) -> list[GenerationBatch]:
        group = config.algorithm.group_size
        return generation_batches(
            prompts, stream="train", step=number, group_size=group, sampling=sampling, seed=1, max_rows=rows
        )

    report("embedded default", rounds * 5, {"engine": lambda number: tokens_of(engine, step(number))})


def beside_generate(layers: int, rounds: int) -> None:
    """Greedy decoding of as many tokens per row, in turns."""
    model, tokenizer = smollm2(layers)
    for rows in (1, 8, 32):
        engine = engine_of(model, tokenizer, frozenset({model.config.vocab_size - 1}), rows)
        ids = torch.randint(3, 49000, (rows, PROMPT), generator=torch.Generator().manual_seed(rows))

        def ours(number: int, engine: RolloutEngine = engine, ids: torch.Tensor = ids) -> int:
            return tokens_of(engine, batches_of(ids.tolist(), len(ids), NEW, do_sample=False))

        def theirs(number: int, ids: torch.Tensor = ids) -> int:
            return plainly_generated(model, ids)

        report(f"SmolLM2 shape, {layers} layers, {rows} rows", rounds, {"generate": theirs, "engine": ours})


def plainly_generated(model: PreTrainedModel, ids: torch.Tensor) -> int:
    """Let transformers' `generate` decode greedily; returns the number of tokens."""
    given = {"do_sample": False, "min_new_tokens": NEW, "max_new_tokens": NEW, "pad_token_id": 0}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **given)[:, ids.shape[1] :].numel()


def replayed(layers: int, rounds: int, texts: Path) -> None:
    """The engine draws given texts, eight of them alone and together; `generate` decodes as many tokens."""
    model, tokenizer = smollm2(layers)
    pairs = list(itertools.islice(long_enough(texts), 8))
    if len(pairs) < 8:
        sys.exit(
            f"{texts}: {len(pairs)} pairs have a question of {PROMPT} tokens and an answer of {NEW}; give 8 or more"
        )
    prompts, answers = [list(question) for question, _ in pairs], np.array([answer for _, answer in pairs])
    answer_of: dict[int, np.ndarray] = {}

    for rows in (1, 8):
        engine = engine_of(model, tokenizer, frozenset({model.config.vocab_size - 1}), rows)

        def ours(number: int, engine: RolloutEngine = engine, rows: int = rows) -> int:
            batches = batches_of(prompts, rows, NEW, do_sample=False)
            answer_of.update(zip(np.concatenate([rng_keys(each) for each in batches]).tolist(), answers, strict=True))
            return tokens_of(engine, batches)

        def theirs(number: int, rows: int = rows) -> int:
            return sum(plainly_generated(model, ids) for ids in torch.tensor(prompts).split(rows))

        with drawn(answer_of):
            report(f"SmolLM2 shape, given text, {rows} rows", rounds, {"generate": theirs, "engine": ours})


@contextlib.contextmanager
def drawn(answer_of: Mapping[int, np.ndarray]) -> Iterator[None]:
    """Let the engine draw given tokens, by the RNG key of each row; it also samples, for its time."""
    from rlinf_lite.rollout import host_decoder, sampling

    def draw(logits: torch.Tensor, how: Sampling, keys: np.ndarray, t: np.ndarray) -> torch.Tensor:
        sampling.draw(logits, how, keys, t)
        return torch.from_numpy(np.array([answer_of[key][at] for key, at in zip(keys.tolist(), t, strict=True)]))

    with mock.patch.object(host_decoder, "draw", draw):
        yield


def long_enough(texts: Path) -> Iterator[tuple[list[int], list[int]]]:
    """The last `PROMPT` tokens of questions, and the first `NEW` of their answers, as words, digits and signs."""
    ids: dict[str, int] = {}
    for line in texts.read_text().splitlines():
        row = json.loads(line)
        question, answer = (
            [
                ids.setdefault(token, len(ids) + 3)
                for token in re.findall(r" ?[A-Za-z]+|\d| ?[^\sA-Za-z\d]|\s", row[name])
            ]
            for name in ("question", "answer")
        )
        if len(question) >= PROMPT and len(answer) >= NEW:
            yield question[-PROMPT:], answer[:NEW]


def uneven(_: int, rounds: int) -> None:
    """Responses end at one of many end tokens, after about 200 tokens; four layers."""
    model, tokenizer = smollm2(4, vocab_size=4096)
    engine = engine_of(model, tokenizer, frozenset(range(20)), 16)
    prompts = torch.randint(20, 4096, (64, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()

    def decoded(rows: int, number: int) -> int:
        return tokens_of(engine, batches_of(prompts, rows, 512, do_sample=True, step=number))

    ways = {f"batches of {rows}": functools.partial(decoded, rows) for rows in (16, 64)}
    report("uneven lengths, 16 at once", rounds, ways)


def smollm2(layers: int, vocab_size: int = 49152) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M's shape with random weights, and a tokenizer whose texts nobody reads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).eval(), hf_directory.load_tokenizer(hf_directory.resolve(EMBEDDED))


def engine_of(
    source: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int], rows: int
) -> RolloutEngine:
    """An engine with the weights of ``source``, which reports log-probs."""
    config = load([])
    model = build.build_on_meta(type(source.config).from_dict(source.config.to_dict()), "fp32")
    engine = build_engine(
        RolloutConfig(max_running_requests=rows, return_logprobs=True),
        model,
        tokenizer,
        seq_length=1024,
        sampling=config.algorithm.sampling_params,
        model_dir=hf_directory.resolve(EMBEDDED),
        shapes=weight_shapes(model),
        eos_ids=eos_ids,
        device=torch.device("cpu"),
        materialize=build.materialize,
    )
    engine.load_weights((name, 0, tensor.detach()) for name, tensor in named_weights(source))  # type: ignore[misc]
    return engine


def batches_of(
    prompts: list[list[int]], rows: int, new: int, *, do_sample: bool, step: int = 0
) -> list[GenerationBatch]:
    """Generation batches of ``rows`` prompts, with one response each."""
    how = {"do_sample": do_sample, "max_new_tokens": new, "top_p": 1.0, "top_k": -1}
    sampling = Sampling(**{**plain_sampling(), **how})
    made = [
        Prompt(
            prompt_index=index,
            epoch=0,
            problem=Problem(problem_id=index, prompt="", answer="", prompt_ids=tuple(ids), source="made"),
        )
        for index, ids in enumerate(prompts)
    ]
    return generation_batches(made, stream="train", step=step, group_size=1, sampling=sampling, seed=1, max_rows=rows)


@functools.cache
def plain_sampling() -> dict[str, Any]:
    """The default config's."""
    return vars(load([]).algorithm.sampling_params)


def tokens_of(engine: RolloutEngine, batches: list[GenerationBatch]) -> int:
    """Generate; returns the number of tokens."""
    groups = [group for batch in batches for group in engine.generate(batch)]
    return sum(len(response.token_ids) for group in groups for response in group.responses)


def report(name: str, rounds: int, ways: Mapping[str, Callable[[int], int]]) -> None:
    """Run all ways by turns, and print the median speed of each, and its ratio to the first one's, round by round."""
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):  # the first warms up
        for way, run in ways.items():
            began = time.process_time()
            tokens = run(number)
            speeds[way].append(tokens / (time.process_time() - began))
    first = next(iter(speeds.values()))
    for way, found in speeds.items():
        ratio = median(one / other for one, other in zip(found[1:], first[1:], strict=True))
        print(f"{name}: {way:>9} {median(found[1:]):>9.1f} tok/cpu s, {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
