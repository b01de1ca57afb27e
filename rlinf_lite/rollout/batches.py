"""Splits the prompts of a step or a validation into generation batches.

With vLLM by config and step alone, because the batch in which a response is generated may change its bits. The builtin
engine's responses do not depend on it, so its batches suit the workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from rlinf_lite.config import DataConfig, RolloutConfig, SamplingConfig
from rlinf_lite.counters import counter_hash
from rlinf_lite.types import GenerationBatch, Group, Problem, Prompt, Response, Sampling

_WAVES = 4
"""Rows of a builtin engine's batch at most, times ``max_running_requests``: a batch of a lost worker is done again."""


def rows_per_batch(rollout: RolloutConfig, *, num_prompts: int, group_size: int, num_workers: int) -> int:
    """Responses per generation batch of a training step.

    A builtin engine gets its share of the step at once: rows wait in the engine until others finish.
    """
    if rollout.rollout_backend != "builtin":
        return rollout.max_running_requests
    share = -(-num_prompts // num_workers) * group_size
    return min(share, _WAVES * rollout.max_running_requests)


def generation_batches(
    prompts: Sequence[Prompt],
    *,
    stream: str,
    step: int,
    group_size: int,
    sampling: Sampling,
    seed: int,
    max_rows: int,
) -> list[GenerationBatch]:
    """Split ``prompts`` into batches of whole groups, in order.

    Args:
        group_size: responses per prompt.
        max_rows: most responses per batch; a batch has at least one group.
    """
    num_prompts = max(1, max_rows // group_size)
    return [
        GenerationBatch(
            stream=stream,
            step=step,
            index=index,
            prompts=tuple(prompts[first : first + num_prompts]),
            group_size=group_size,
            sampling=sampling,
            seed=seed,
        )
        for index, first in enumerate(range(0, len(prompts), num_prompts))
    ]


def validation_batches(
    problems: Sequence[Problem],
    *,
    step: int,
    num_samples: int,
    data: DataConfig,
    rollout: RolloutConfig,
    sampling: SamplingConfig,
    seed: int,
) -> list[list[GenerationBatch]]:
    """The validation after ``step``: a list of generation batches for each ``data.val_rollout_batch_size`` problems.

    The training loop and ``python -m rlinf_lite.eval`` both call this, so their responses are bitwise identical.
    """
    prompts = [Prompt(prompt_index=problem.problem_id, epoch=0, problem=problem) for problem in problems]
    size = data.val_rollout_batch_size or data.rollout_batch_size
    return [
        generation_batches(
            prompts[first : first + size],
            stream="val",
            step=step,
            group_size=num_samples,
            sampling=Sampling(**vars(sampling)),
            seed=seed,
            max_rows=rollout.max_running_requests,
        )
        for first in range(0, len(prompts), size)
    ]


def grouped(batch: GenerationBatch, responses: Sequence[Response]) -> list[Group]:
    """The responses to each prompt of ``batch``, which come in the order of `rng_keys`."""
    size = batch.group_size
    return [
        Group(prompt=prompt, responses=tuple(responses[index * size : (index + 1) * size]))
        for index, prompt in enumerate(batch.prompts)
    ]


def join(results: Iterable[list[Group]]) -> list[Group]:
    """All groups in canonical order, by prompt index, whichever worker finished first."""
    return sorted((group for result in results for group in result), key=lambda group: group.prompt.prompt_index)


def rng_keys(batch: GenerationBatch) -> np.ndarray:
    """One RNG key per row, from (stream, seed, step, prompt index, sample index): all the randomness of a response."""
    prompt_indices = np.array([prompt.prompt_index for prompt in batch.prompts]).repeat(batch.group_size)
    samples = np.tile(np.arange(batch.group_size), len(batch.prompts))
    return counter_hash(batch.stream, batch.seed, batch.step, prompt_indices, samples)
