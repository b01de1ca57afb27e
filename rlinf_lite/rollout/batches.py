"""Cutting a step's prompts into canonical chunks: by config and step alone, whatever the number of workers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from rlinf_lite.counters import counter_hash
from rlinf_lite.types import GenerationBatch, Prompt, Rollout, Sampling


def cut(
    prompts: Sequence[Prompt],
    *,
    stream: str,
    step: int,
    group_size: int,
    sampling: Sampling,
    seed: int,
    max_rows: int,
) -> list[GenerationBatch]:
    """Whole groups, in order, at most ``max_rows`` responses a chunk (but at least one group)."""
    per_chunk = max(1, max_rows // group_size)
    return [
        GenerationBatch(
            stream=stream,
            step=step,
            index=index,
            prompts=tuple(prompts[first : first + per_chunk]),
            group_size=group_size,
            sampling=sampling,
            seed=seed,
        )
        for index, first in enumerate(range(0, len(prompts), per_chunk))
    ]


def join(results: Iterable[list[Rollout]]) -> list[Rollout]:
    """All rollouts in canonical order: by prompt position, then sample index, whoever finished first."""
    return sorted((r for result in results for r in result), key=lambda r: (r.position, r.sample_index))


def noise_keys(chunk: GenerationBatch) -> np.ndarray:
    """One counter a row: (stream, seed, step, prompt id, sample index). All the randomness that a response gets."""
    positions = np.array([prompt.position for prompt in chunk.prompts]).repeat(chunk.group_size)
    samples = np.tile(np.arange(chunk.group_size), len(chunk.prompts))
    return counter_hash(chunk.stream, chunk.seed, chunk.step, positions, samples)
