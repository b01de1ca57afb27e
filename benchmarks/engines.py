"""Tokens per second of both rollout engines, in turns on the same batches with the same weights.

    python benchmarks/engines.py [CONFIG] [--rounds 3] [hydra overrides ...]

In one process, without Ray; needs an environment with vLLM (docs/vllm.md). `tok/s` is by the clock, `tok/cpu s` by the
processor time of this process, which other work on the machine disturbs less. `of builtin` compares round by round, on
CPUs by the latter, on GPUs by the former.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median

import torch
from transformers import AutoModelForCausalLM

from rlinf_lite.cluster.workers.rollout_worker import RolloutWorker
from rlinf_lite.config import Config
from rlinf_lite.config.compose import load
from rlinf_lite.data import load_problems
from rlinf_lite.models import build, hf_directory
from rlinf_lite.rollout.batches import generation_batches
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


@dataclass(kw_only=True, slots=True)
class Engine:
    worker: RolloutWorker
    rounds: list[Round] = field(default_factory=list)

    def step(self, weights: dict[str, torch.Tensor], batches: list[GenerationBatch]) -> None:
        began = time.perf_counter()
        self.worker.engine.load_weights(WeightPiece(name, 0, tensor) for name, tensor in weights.items())
        loaded, cpu = time.perf_counter(), time.process_time()
        groups = [group for batch in batches for group in self.worker.generate(batch)]
        tokens = sum(len(response.token_ids) for group in groups for response in group.responses)
        ended, cpu_ended = time.perf_counter(), time.process_time()
        self.rounds.append(Round(tokens=tokens, wall=ended - loaded, cpu=cpu_ended - cpu, load=loaded - began))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    arguments, rest = parser.parse_known_args()
    config = load(rest)
    device = "cuda" if torch.cuda.is_available() and config.cluster.device != "cpu" else "cpu"
    weights = dict(stored_weights(config))
    engines = {backend: Engine(worker=make(config, backend, device)) for backend in BACKENDS}
    for round_ in range(arguments.rounds + 1):  # the first warms up
        batches = make_batches(config, step=round_)
        for engine in engines.values():
            engine.step(weights, batches)
    report(config, engines, device, arguments.rounds)
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
    print(f"{'engine':>10} {'tok/s':>9} {'tok/cpu s':>10} {'load s':>8} {'of builtin':>11}")
    plain = engines["builtin"].rounds[1:]
    for name, engine in engines.items():
        made = engine.rounds[1:]
        wall, cpu = median(r.tokens / r.wall for r in made), median(r.tokens / r.cpu for r in made)
        ratio = median(_speed(one, device) / _speed(other, device) for one, other in zip(made, plain, strict=True))
        print(f"{name:>10} {wall:>9.1f} {cpu:>10.1f} {median(r.load for r in made):>8.2f} {ratio:>11.2f}")


def _speed(made: Round, device: str) -> float:
    return made.tokens / (made.cpu if device == "cpu" else made.wall)


if __name__ == "__main__":
    main()
