"""Records that pass between packages and processes. Values only: no behaviour, no Ray, no torch at run time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One row of a data set: a question and its reference answer."""

    problem_id: int
    """Index of the row in the data set (all files in their configured order, without filtered rows)."""
    prompt: str
    """The question exactly as the model sees it (chat template applied, if configured)."""
    answer: str
    """The reference answer as the data set states it, for example ``"... #### 72"`` or ``"95"``."""
    prompt_ids: tuple[int, ...]
    """Token ids of ``prompt``."""
    source: str
    """Where the row came from, for messages: ``"train.jsonl:17"``."""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """More for a reward function: the row's ``data.metadata_keys``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One occurrence of a problem in the stream of prompts (or in the validation set)."""

    prompt_index: int
    """Place in the stream, never repeated within a run (in the validation set: the problem id). Sampling seeds are
    derived from it."""
    epoch: int
    problem: Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are sampled."""

    do_sample: bool
    """False: greedy; only ``max_new_tokens`` and ``repetition_penalty`` matter then."""
    temperature: float
    top_k: int
    """Keep the k most likely tokens; 0 or less keeps all."""
    top_p: float
    repetition_penalty: float
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationBatch:
    """A canonical unit of generation: whole groups that one process generates together.

    Its composition follows from config and step alone, never from the number of workers, because the batch in which a
    sequence is computed changes its bits.
    """

    stream: str
    """``"train"`` or ``"val"``: their RNG keys are always different."""
    step: int
    """The current step (completed steps + 1)."""
    index: int
    """Index of this batch within the step."""
    prompts: tuple[Prompt, ...]
    group_size: int
    sampling: Sampling
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One sampled response."""

    prompt_index: int
    """``Prompt.prompt_index`` of its prompt."""
    sample_index: int
    """0 .. group_size - 1."""
    prompt_ids: np.ndarray
    """int64 [P]."""
    response_ids: np.ndarray
    """int64 [R], including the end-of-sequence token if there is one."""
    logprobs: np.ndarray | None
    """float32 [R]: log-probs of the response tokens at the sampling temperature, before top-k, top-p and the
    repetition penalty; None if the engine does not report them."""
    finished: bool
    """True: ended with an end-of-sequence token; False: truncated at ``max_new_tokens``."""
    text: str
    """``response_ids`` decoded without special tokens."""
    error: str | None = None
    """Why the engine could not generate this response (it is then not graded, and ``response_ids`` may be empty);
    None if it could."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """A canonical unit of training: rows computed together by one rank. Right padded, prompt first.

    Suffixes: B rows, T tokens of the longest row; per-token fields are aligned with the *predicted* token: column t
    belongs to ``input_ids_BT[:, t + 1]``, and there are T - 1 columns.
    """

    index: int
    """Index in the mini-batch: metrics are summed in this order, whatever the number of ranks."""
    input_ids_BT: Tensor
    """int64; padding holds the tokenizer's pad id, or 0."""
    loss_mask_BT: Tensor
    """float32 [B, T-1]: 1 on response tokens, 0 on prompt and padding, and on all of a row that is left out."""
    advantages_BT: Tensor
    """float32 [B, T-1]."""
    min_prompt_len: int
    """Length of the shortest prompt: no logits are needed before column ``min_prompt_len - 1``."""
    old_logprobs_BT: Tensor | None = None
    """float32 [B, T-1] from before the update; None: on-policy, the current ones (detached) are used."""
    ref_logprobs_BT: Tensor | None = None
    """float32 [B, T-1] of the frozen reference; None without a KL term."""
    rollout_logprobs_BT: Tensor | None = None
    """float32 [B, T-1] as the engine reported them; None if it did not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MiniBatch:
    """What one optimizer step sees, over all ranks."""

    micro_batches: tuple[MicroBatch, ...]
    num_tokens: int
    """Loss tokens of the whole mini-batch, over all ranks: the token-mean normalizer. 0: no optimizer step is taken."""
    num_sequences: int
    """Rows with loss tokens of the whole mini-batch, over all ranks."""


class Column(StrEnum):
    """A value per loss token, float32 [M]."""

    ADVANTAGE = "advantage"
    RETURN = "return"
    OLD_LOGPROB = "old_logprob"
    """Of the policy that the advantages are for, before the update."""
    REF_LOGPROB = "ref_logprob"
    """Of the frozen reference model."""
    ENGINE_LOGPROB = "engine_logprob"
    """As the rollout engine reported it."""
    OLD_VALUE = "old_value"
    """Of the critic, before the update."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalizers:
    """What losses and metrics are divided by. Both count the whole mini-batch, over all ranks."""

    num_tokens: int
    """Loss tokens."""
    num_sequences: int
    """Responses with loss tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankBatch:
    """What one optimizer step sees on one rank: its own micro-batches, and the normalisers of the whole mini-batch."""

    micro_batches: tuple[MicroBatch | None, ...]
    """As many entries as on every other rank, because all ranks take part in the collectives of each forward and
    backward pass. None: other ranks have one more micro-batch than this one."""
    num_tokens: int
    """`MiniBatch.num_tokens`: of the whole mini-batch, not of this rank."""
    num_sequences: int
    """`MiniBatch.num_sequences`: of the whole mini-batch, not of this rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GradingItem:
    """One response to a problem, as a grader sees it."""

    prompt: str
    """`Problem.prompt`."""
    response: str
    """Decoded, without special tokens."""
    answer: str
    """`Problem.answer`."""
    finished: bool
    """False if the response was truncated."""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """`Problem.metadata`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """The grade of one response, or why it has none."""

    reward: float
    """Scaled by ``reward.reward_scale``; 0.0, without meaning, if not graded."""
    correct: bool
    """False when not graded."""
    error: str | None = None
    """What went wrong when this response was generated or graded; None if nothing did."""
    graded: bool = True
    """False: grader or generation failed, so the response has no grade. It is left out of its group's statistics and of
    the loss. What the response itself causes (an expression too large to evaluate) is not a failure of the
    grader: that is graded, as wrong, with the reason in ``error``."""
