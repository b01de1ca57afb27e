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
    min_p: float = 0.0
    """Keep tokens whose probability is at least this times the largest; 0 keeps all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationBatch:
    """Whole groups that one process generates together.

    With vLLM its composition follows from config and step alone, never from the number of workers, because the batch in
    which a sequence is computed may change its bits.
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

    @property
    def weights_step(self) -> int:
        """Completed steps of the weights that sample it."""
        return self.step - 1 if self.stream == "train" else self.step


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """One sampled response to a prompt."""

    sample_index: int
    """0 .. group_size - 1."""
    token_ids: np.ndarray
    """int64 [R], including the end-of-sequence token if there is one; empty if there is an ``error``."""
    loss_mask: np.ndarray
    """bool [R]: the tokens that are trained. False for tokens that the policy did not sample, such as a tool's."""
    logprobs: np.ndarray | None
    """float32 [R]: log-probs of the tokens at the sampling temperature, before top-k, top-p and the repetition penalty;
    None if the engine does not report them."""
    finished: bool
    """True: ended with an end-of-sequence token; False: truncated at ``max_new_tokens``."""
    text: str
    """``token_ids`` decoded without special tokens."""
    weights_step: int
    """Completed steps of the weights that sampled it."""
    error: str | None = None
    """Why the engine could not generate it (it is then not graded, and has perhaps no tokens); None if it could."""
    score: Score | None = None
    """Its grade; None before grading."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A prompt with its responses, by sample index."""

    prompt: Prompt
    responses: tuple[Response, ...]


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
class Segments:
    """S runs of tokens that form a forest: a token sees its segment's ancestors, and what is before it in its own."""

    start_S: Tensor
    """int64: index of the first token in the unit."""
    stop_S: Tensor
    """int64: index after the last token; may equal ``start_S``."""
    parent_S: Tensor
    """int64: an earlier segment; -1: a root (a prompt)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBatch:
    """A canonical unit of training: N tokens computed together by one rank, of which M loss tokens are trained.

    A prompt is stored once, whatever the number of responses to it, and so are equal responses to it: each is a segment
    without children, of which several of the R responses may consist.
    """

    index: int
    """Index in the mini-batch: metrics are summed in this order, whatever the number of ranks."""
    ids_N: Tensor
    """int64: tokens of all segments, end to end."""
    positions_N: Tensor
    """int64: position of each token in its own sequence: from the first token of its root."""
    segments: Segments
    source_M: Tensor
    """int64: index in ``ids_N`` of the token that predicts each loss token."""
    targets_M: Tensor
    """int64: the loss tokens."""
    seq_M: Tensor
    """int64, never decreasing: the response that each loss token belongs to, 0 .. R - 1."""
    num_responses: int
    """R, with those that have no loss token."""
    columns: Mapping[Column, Tensor] = field(default_factory=dict)
    """Values per loss token, float32 [M] each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MiniBatch:
    """What one optimizer step sees, over all ranks."""

    units: tuple[TokenBatch, ...]
    norm: Normalizers


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """What one rank computes before a reduction: one slot, a run of units whose gradients it adds up by itself."""

    units: tuple[TokenBatch | None, ...]
    """As many entries as on every other rank, because all ranks take part in the collectives of each forward and
    backward pass. None: the slot of another rank has one more unit, or this rank has no slot."""
    num_slots: int
    """Ranks 0 .. ``num_slots`` - 1 have a slot."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankBatch:
    """What one optimizer step sees on one rank: its own units, and the normalizers of the whole mini-batch."""

    rounds: tuple[Round, ...]
    norm: Normalizers

    @property
    def units(self) -> tuple[TokenBatch | None, ...]:
        """The entries of all rounds."""
        return tuple(unit for each in self.rounds for unit in each.units)


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
    parts: Mapping[str, float] = field(default_factory=dict, hash=False)
    """What each of ``reward.functions`` gave, by name, neither weighted nor scaled; empty without them, and if not
    graded."""
    correct: bool
    """False when not graded."""
    error: str | None = None
    """What went wrong when this response was generated or graded; None if nothing did."""
    graded: bool = True
    """False: grader or generation failed, so the response has no grade. It is left out of its group's statistics and of
    the loss. What the response itself causes (an expression too large to evaluate) is not a failure of the
    grader: that is graded, as wrong, with the reason in ``error``."""
