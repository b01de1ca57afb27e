"""Tokens per second of both rollout engines, in turns on the same batches with the same weights.

    python benchmarks/engines.py [CONFIG] [--smollm2 ROWS [--texts FILE.jsonl]] [--rounds 3] [hydra overrides ...]

In one process, without Ray; needs an environment with vLLM (docs/vllm.md). `tok/s` is by the clock, `tok/cpu s` by the
processor time of this process, which other work on the machine disturbs less. `of builtin` compares round by round, on
CPUs by the latter, on GPUs by the former; `with load` too, but with the time to load a step's weights. `--smollm2`
takes SmolLM2-135M's shape with random weights, and ROWS prompts of 32 tokens with one response of 64 tokens each,
instead of the model and the data of a config. With `--texts` the prompts are the ends of questions in FILE, and the
builtin engine samples, but then takes the first tokens of their answers: drafts are right as often as in a real text.
vLLM takes what it samples, which does not change its time.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from unittest import mock

import _random_model
import numpy as np
import torch
from generation import drawn, long_enough
from transformers import AutoModelForCausalLM

from rlinf_lite.cluster.workers.rollout_worker import RolloutWorker
from rlinf_lite.config import Config
from rlinf_lite.config.compose import load
from rlinf_lite.data import load_problems
from rlinf_lite.models import build, hf_directory
from rlinf_lite.rollout import host_decoder
from rlinf_lite.rollout.batches import generation_batches, rng_keys
from rlinf_lite.types import GenerationBatch, Prompt, Sampling
from rlinf_lite.weights.names import named_weights
from rlinf_lite.weights.pieces import WeightPiece

BACKENDS = ("builtin", "vllm")


@dataclass(kw_only=True, slots=True)
class Round:
    tokens: int
    wall: float
    cpu: float
    load: float
    """Seconds to load the weights before it."""
    cpu_load: float
    """Processor seconds of that."""


@dataclass(kw_only=True, slots=True)
class Engine:
    worker: RolloutWorker
    rounds: list[Round] = field(default_factory=list)

    def step(self, weights: dict[str, torch.Tensor], batches: list[GenerationBatch]) -> None:
        began, cpu_began = time.perf_counter(), time.process_time()
        self.worker.engine.load_weights(WeightPiece(name, 0, tensor) for name, tensor in weights.items())
        loaded, cpu = time.perf_counter(), time.process_time()
        groups = [group for batch in batches for group in self.worker.generate(batch)]
        tokens = sum(len(response.token_ids) for group in groups for response in group.responses)
        ended, cpu_ended = time.perf_counter(), time.process_time()
        times = {"wall": ended - loaded, "cpu": cpu_ended - cpu, "load": loaded - began, "cpu_load": cpu - cpu_began}
        self.rounds.append(Round(tokens=tokens, **times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smollm2", type=int, metavar="ROWS", help="see above")
    parser.add_argument("--texts", type=Path, help="see above")
    arguments, rest = parser.parse_known_args()
    if arguments.smollm2 is None:
        if arguments.texts:
            parser.error("--texts: only with --smollm2")
        measure(load(rest), arguments.rounds)
        return
    prompts, answers = made_up(arguments.smollm2), None
    if arguments.texts:
        prompts, answers = of_texts(arguments.texts, len(prompts))
    with tempfile.TemporaryDirectory() as directory:
        config = load([*smollm2(Path(directory), arguments.smollm2, prompts), *rest])
        with contextlib.nullcontext() if answers is None else drawn_by_index(answers):
            measure(config, arguments.rounds)


def made_up(rows: int) -> list[str]:
    draw = random.Random(1)
    return [" ".join(f"w{draw.randrange(4, 49_152)}" for _ in range(31)) for _ in range(8 * rows)]  # and <bos>


def of_texts(texts: Path, number: int) -> tuple[list[str], np.ndarray]:
    """The ends of questions, and the tokens of their answers [number, 64]."""
    pairs = list(itertools.islice(long_enough(texts), number))
    if len(pairs) < number:
        raise SystemExit(f"{texts}: {len(pairs)} questions and answers are long enough; give {number}")
    prompts = [" ".join(f"w{token + 1}" for token in question[1:]) for question, _ in pairs]
    return prompts, np.array([answer for _, answer in pairs]) + 1  # w4 is the first word


@contextlib.contextmanager
def drawn_by_index(answers: np.ndarray) -> Iterator[None]:
    """Let the builtin engine draw these, by the prompts' indices in the data."""
    answer_of: dict[int, np.ndarray] = {}

    def keys_of(batch: GenerationBatch) -> np.ndarray:
        keys = rng_keys(batch)
        of_batch = answers[[prompt.problem.problem_id for prompt in batch.prompts]]
        answer_of.update(zip(keys.tolist(), of_batch, strict=True))
        return keys

    with drawn(answer_of), mock.patch.object(host_decoder, "rng_keys", keys_of):
        yield


def smollm2(directory: Path, rows: int, prompts: list[str]) -> list[str]:
    """Write model and prompts into ``directory``; return the config's name and overrides."""
    data = directory / "train.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt, "answer": "none"}) + "\n" for prompt in prompts))
    overrides = {
        "fsdp": "cpu",
        "runner.seq_length": 128,
        "runner.val_check_interval": -1,
        "algorithm.adv_type": "reinpp",
        "algorithm.group_size": 1,
        "algorithm.training_batch_size_per_gpu": 1,
        "algorithm.logprob_forward_micro_batch_size": 1,
        "algorithm.sampling_params.max_new_tokens": 64,
        "rollout.model.precision": "fp32",
        "actor.model.model_path": _random_model.save("smollm2-135m", directory / "model", words=True),
        "data.type": "math",
        "data.train_data_paths": f"[{data}]",
        "data.max_prompt_length": 40,
        "data.rollout_batch_size": rows,
        "data.apply_chat_template": "false",
        "data.system_prompt": "null",
        "data.few_shot": "[]",
        "reward.reward_type": "custom",
        "reward.path": f"{Path(__file__).parent / '_made_up_reward.py'}:score",
    }
    return ["smollm2-135m-sums", *(f"{key}={value}" for key, value in overrides.items())]


def measure(config: Config, rounds: int) -> None:
    """Run both engines in turns, and print what they did."""
    device = "cuda" if torch.cuda.is_available() and config.cluster.device != "cpu" else "cpu"
    weights = dict(stored_weights(config))
    engines = {backend: Engine(worker=make(config, backend, device)) for backend in BACKENDS}
    for round_ in range(rounds + 1):  # the first warms up
        batches = make_batches(config, step=round_)
        for engine in engines.values():
            engine.step(weights, batches)
    report(config, engines, device, rounds)
    for engine in engines.values():
        engine.worker.engine.close()


def stored_weights(config: Config) -> Iterator[tuple[str, torch.Tensor]]:
    settings = config.rollout.model
    model_dir = hf_directory.resolve(settings.model_path, "rollout.model.model_path")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=build.DTYPES[settings.precision])
    return ((name, tensor.detach()) for name, tensor in named_weights(model))


def make(config: Config, backend: str, device: str) -> RolloutWorker:
    rollout = config.rollout.model_copy(update={"rollout_backend": backend})
    worker = RolloutWorker(0, 1, rollout, config.actor.tokenizer, config.cluster, device)
    worker.setup(config.algorithm.sampling_params, config.runner.seq_length)
    return worker


def make_batches(config: Config, step: int) -> list[GenerationBatch]:
    """One step's batches; every step has other prompts."""
    tokenizer = hf_directory.load_tokenizer(hf_directory.resolve(config.actor.tokenizer.tokenizer_model))
    problems, size = load_problems(config.data, "train", tokenizer).problems, config.data.rollout_batch_size
    first = step * size % max(1, len(problems) - size)
    return generation_batches(
        [Prompt(prompt_index=p.problem_id, epoch=0, problem=p) for p in problems[first : first + size]],
        stream="train",
        step=step,
        group_size=config.algorithm.group_size,
        sampling=Sampling(**vars(config.algorithm.sampling_params)),
        seed=config.actor.seed,
        max_rows=config.rollout.max_running_requests,
    )


def report(config: Config, engines: dict[str, Engine], device: str, rounds: int) -> None:
    sampling, rollout = config.algorithm.sampling_params, config.rollout
    print(
        f"{rollout.model.model_path}, {rollout.model.precision}, {device}, "
        f"{config.cluster.threads_per_worker} thread(s)\n"
        f"{config.data.rollout_batch_size} prompts x {config.algorithm.group_size}, at most {sampling.max_new_tokens} "
        f"new tokens, {rollout.max_running_requests} at once; medians of {rounds} rounds"
    )
    print(f"{'engine':>10} {'tok/s':>9} {'tok/cpu s':>10} {'load s':>8} {'of builtin':>11} {'with load':>10}")
    plain = engines["builtin"].rounds[1:]
    for name, engine in engines.items():
        made = engine.rounds[1:]
        wall, cpu = median(r.tokens / r.wall for r in made), median(r.tokens / r.cpu for r in made)
        ratios = [
            median(
                _speed(one, device, load) / _speed(other, device, load) for one, other in zip(made, plain, strict=True)
            )
            for load in (False, True)
        ]
        load = median(r.load for r in made)
        print(f"{name:>10} {wall:>9.1f} {cpu:>10.1f} {load:>8.2f} {ratios[0]:>11.2f} {ratios[1]:>10.2f}")


def _speed(made: Round, device: str, with_load: bool) -> float:
    seconds, load = (made.cpu, made.cpu_load) if device == "cpu" else (made.wall, made.load)
    return made.tokens / (seconds + load * with_load)


if __name__ == "__main__":
    main()
