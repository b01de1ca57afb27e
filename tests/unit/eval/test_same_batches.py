"""The training loop and ``python -m rlinf_lite.eval`` generate the same validation batches."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from rlinf_lite.config import Config, build
from rlinf_lite.data import load_problems
from rlinf_lite.eval.command import batches_of
from rlinf_lite.models import hf_directory
from rlinf_lite.observability import PhaseTimer
from rlinf_lite.runner.generation import Generation, Validation
from rlinf_lite.runner.loop import Runner
from rlinf_lite.runner.progress import Progress
from rlinf_lite.types import GenerationBatch, Group, Prompt, Response, Score


class Engines:
    """Stands in for the rollout workers and their queue: records the generation batches, returns empty responses."""

    def __init__(self) -> None:
        self.batches: list[GenerationBatch] = []

    def queue(self):
        self.new: list = []
        return self

    def add(self, key, batch) -> None:
        self.new.append((key, batch))

    def results(self, beside=()):
        for key, batch in self.new:
            self.batches.append(batch)
            yield key, [empty(prompt) for prompt in batch.prompts]


class Graders(Engines):
    """Stands in for the reward workers and their queue: every response is wrong."""

    items_per_call = 64

    def results(self, beside=()):
        return ((names, [Score(reward=0.0, correct=False)] * len(names)) for names, _ in self.new)


def empty(prompt: Prompt) -> Group:
    none = np.zeros(0, dtype=np.int64)
    response = Response(
        sample_index=0,
        token_ids=none,
        loss_mask=none == 0,
        logprobs=None,
        finished=True,
        text="",
        weights_step=0,
    )
    return Group(prompt=prompt, responses=(response,))


def validated_by_the_loop(config: Config, problems, step: int) -> list[GenerationBatch]:
    """The batches that the loop hands to its rollout workers in the validation after ``step``."""
    engines = Engines()
    progress = Progress()
    progress.step = step
    unused = (
        *("source", "algorithm", "models", "log_rollouts"),
        *("self_check", "replicas", "hub", "samples", "saver", "stop", "between_steps"),
    )
    runner = Runner(
        trainers=SimpleNamespace(watched=lambda *_: nullcontext()),
        generation=Generation(rollouts=engines, rewards=Graders(), enable_sleep=False, max_failed_fraction=0.0),
        validation=Validation(
            problems=problems,
            interval=4,
            data=config.data,
            rollout=config.rollout,
            sampling=config.algorithm.val_sampling_params,
            seed=config.actor.seed,
        ),
        weights=SimpleNamespace(publish=lambda step: None),
        progress=progress,
        last_step=8,
        **dict.fromkeys(unused),
    )
    runner.validate(PhaseTimer())
    return engines.batches


@pytest.mark.parametrize(("val_rollout_batch_size", "max_running_requests"), [(None, 5), (7, 3), (64, 256)])
def test_the_loop_and_an_evaluation_generate_the_same_batches(settings, val_rollout_batch_size, max_running_requests):
    settings["data"]["val_rollout_batch_size"] = val_rollout_batch_size
    settings["rollout"]["max_running_requests"] = max_running_requests
    config = build(settings)
    tokenizer = hf_directory.load_tokenizer(hf_directory.resolve("embedded:tiny-arithmetic"))
    problems = load_problems(config.data, "val", tokenizer).problems
    of_the_loop = validated_by_the_loop(config, problems, step=4)
    assert sum(len(batch.prompts) for batch in of_the_loop) == 20
    assert of_the_loop == batches_of(config, problems, step=4, num_samples=1)
