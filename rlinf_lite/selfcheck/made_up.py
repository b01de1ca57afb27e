"""Prompts and responses of random tokens for the self-check: no data set is read, and every process makes the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlinf_lite.counters import counter_hash
from rlinf_lite.rollout.batches import grouped
from rlinf_lite.types import GenerationBatch, Group, Problem, Prompt, Response, Sampling

_STREAM = "check"


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How large the made-up batch is."""

    prompt_lengths: tuple[int, ...]
    """Tokens of each prompt; fewer where ``runner.seq_length`` leaves no room for them."""
    group_size: int
    """Responses per prompt."""
    max_new_tokens: int
    """Or ``algorithm.sampling_params.max_new_tokens`` if that is less."""


SMALL = {
    "cpu": Size(prompt_lengths=(3, 34, 9), group_size=2, max_new_tokens=4),
    "cuda": Size(prompt_lengths=(3, 34, 9), group_size=32, max_new_tokens=16),
}
"""Of the check at the start of a run, by kind of device: some seconds at most, with as many rows as that allows."""
LARGE = {
    "cpu": Size(prompt_lengths=(1, 90, 33, 7, 64, 40, 2, 18), group_size=6, max_new_tokens=64),
    "cuda": Size(prompt_lengths=(1, 90, 33, 7, 64, 40, 2, 18), group_size=32, max_new_tokens=64),
}
"""Of ``python -m rlinf_lite.selfcheck``."""


def batch_of(size: Size, vocab_size: int, sampling: Sampling, seq_length: int) -> GenerationBatch:
    """A generation batch of made-up prompts.

    Args:
        sampling: of training.
        seq_length: largest number of tokens in a prompt and its response together.
    """
    num_new = min(sampling.max_new_tokens, size.max_new_tokens, seq_length - 1)
    lengths = [min(length, seq_length - num_new) for length in size.prompt_lengths]
    prompts = [_prompt(index, length, vocab_size) for index, length in enumerate(lengths)]
    return GenerationBatch(
        stream=_STREAM,
        step=0,
        index=0,
        prompts=tuple(prompts),
        group_size=size.group_size,
        sampling=replace(sampling, max_new_tokens=num_new),
        seed=0,
    )


def end_tokens(vocab_size: int) -> frozenset[int]:
    """Token ids that end a made-up response, one in 8, so that rows leave the engine at different times."""
    return frozenset(range(4, vocab_size, 8))


def _prompt(index: int, length: int, vocab_size: int) -> Prompt:
    ids = tuple(_tokens("prompt", index, length, vocab_size).tolist())
    problem = Problem(problem_id=index, prompt="", answer="", prompt_ids=ids, source="self-check")
    return Prompt(prompt_index=index, epoch=0, problem=problem)


def parts_of(batch: GenerationBatch, rows: int) -> list[GenerationBatch]:
    """Other compositions of ``batch``: so many prompts at a time, the last ones first, with one response each."""
    backwards = batch.prompts[::-1]
    firsts = range(0, len(backwards), rows)
    return [replace(batch, prompts=backwards[first : first + rows], group_size=1) for first in firsts]


def made_up_groups(batch: GenerationBatch, vocab_size: int) -> list[Group]:
    """Responses of random tokens, for a trainer whose engine is not asked for any."""
    responses = []
    for row in range(len(batch.prompts) * batch.group_size):
        ids = _tokens("response", row, 1 + row % batch.sampling.max_new_tokens, vocab_size)
        responses.append(_response(row % batch.group_size, ids))
    return grouped(batch, responses)


def _response(sample_index: int, ids: np.ndarray) -> Response:
    return Response(
        sample_index=sample_index,
        token_ids=ids,
        loss_mask=np.ones(len(ids), dtype=np.bool_),
        logprobs=None,
        finished=False,
        text="",
        weights_step=0,
    )


def _tokens(what: str, index: int, length: int, vocab_size: int) -> np.ndarray:
    hashes = counter_hash(_STREAM, what, index, np.arange(length))
    return (hashes % np.uint64(vocab_size)).astype(np.int64)


def first_difference(groups: Sequence[Group], again: Sequence[Group]) -> str | None:
    """Where responses of ``again`` are not bitwise those of ``groups``; None if all are.

    Args:
        again: some of the same prompts, each with some of the same samples.
    """
    by_row = {(group.prompt.prompt_index, r.sample_index): r for group in groups for r in group.responses}
    for group in again:
        for response in group.responses:
            row = group.prompt.prompt_index, response.sample_index
            if (what := _difference(by_row[row], response)) is not None:
                return f"{what} of response {row[1]} to prompt {row[0]}"
    return None


def _difference(one: Response, other: Response) -> str | None:
    if not np.array_equal(one.token_ids, other.token_ids):
        return "the tokens"
    if one.logprobs is None or other.logprobs is None or one.logprobs.tobytes() == other.logprobs.tobytes():
        return None
    return "the log-probs"
