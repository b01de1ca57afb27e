"""What an algorithm is: the protocol that the runner and the trainers use, and the records that pass between them.

Suffixes: P prompts (groups), G responses per prompt, M loss tokens. A tensor ``_M`` is flat over the loss tokens of
responses in canonical order: those of one response are contiguous, in the order in which they were sampled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from rlinf_lite.types import Column, Normalizers


@dataclass(frozen=True, kw_only=True, slots=True)
class Graded:
    """What an algorithm sees of the responses of a step. All ranks' responses are here, because groups are whole."""

    rewards_PG: Tensor
    """float64, scaled and weighted; finite even where not counted."""
    counted_PG: Tensor
    """bool: graded, so part of statistics and loss."""
    finished_PG: Tensor
    """bool: ended with an end-of-sequence token; False: truncated."""
    num_tokens_PG: Tensor
    """int64: loss tokens of each response, 0 where not counted."""
    max_tokens: int
    """``algorithm.sampling_params.max_new_tokens``."""
    columns: Mapping[Column, Tensor]
    """float32 [M] each, over the loss tokens of all responses in order: the columns that `Algorithm.needs` names. Empty
    in `Algorithm.admit`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Credit:
    """What an algorithm makes of the rewards."""

    columns: Mapping[Column, Tensor]
    """float32 [M] each, over the same tokens as `Graded.columns`: ADVANTAGE, and RETURN with a critic."""
    trained_PG: Tensor
    """bool: the response adds to the loss. A subset of `Graded.counted_PG`."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of the whole step, by their logged names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossInputs:
    """What a loss sees of one unit of training (M loss tokens)."""

    logprob_M: Tensor | None = None
    """float32, differentiable, of the policy being trained; None in a critic's loss."""
    entropy_M: Tensor | None = None
    """float32, differentiable, of the policy's distribution; None unless `Loss.wants_entropy`."""
    value_M: Tensor | None = None
    """float32, differentiable, of the critic being trained; None in a policy's loss."""
    columns: Mapping[Column, Tensor]
    """float32 [M] each. OLD_LOGPROB is always here for a policy's loss (on-policy: the current ones, detached)."""
    seq_M: Tensor
    """int64, non-decreasing: the response that a token belongs to, 0 .. num_responses - 1."""
    num_responses: int
    """Of this unit."""
    norm: Normalizers
    """Of the whole mini-batch, over all units and ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOutputs:
    """What one unit adds to the mini-batch. Everything adds up over units and ranks, however responses are split."""

    loss: Tensor
    """Scalar, differentiable: what the unit adds to the mini-batch's loss."""
    shares: Mapping[str, Tensor]
    """0-dimensional, detached: what the unit adds to the metric of that name. A name that begins with ``_`` is not
    logged: `combine` makes metrics from it."""
    token_sums: Mapping[str, Tensor]
    """0-dimensional, detached: sums over the unit's loss tokens. Added up and divided by `Normalizers.num_tokens`, they
    are the metric of that name."""


class Loss(Protocol):
    """A loss that one model, policy or critic, is trained with."""

    wants_entropy: bool
    """True: `LossInputs.entropy_M` must be there."""

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """Compute the unit's loss. It must not depend on what else is in the mini-batch, except through the norm."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """One loss per trained model."""

    policy: Loss
    critic: Loss | None = None
    """None: no critic is trained."""


class Algorithm(Protocol):
    """Decides what a step trains on, how each token is credited, and with which losses.

    The runner calls `admit` when a step's responses are graded, lets forward passes supply the columns in `needs`, and
    calls `credit`; the trainers call the losses. All are pure functions of their arguments and the config, so that a
    resumed run comes to the same numbers.
    """

    needs: frozenset[Column]
    """Columns that `credit` or a loss reads and that forward passes or the engine must supply."""

    def admit(self, graded: Graded) -> Tensor:
        """Choose the groups that are trained on: bool [P]. Others are dropped, and refilled if the config says so."""
        ...

    def credit(self, graded: Graded) -> Credit:
        """Assign an advantage (and a return) to each loss token of the admitted groups."""
        ...

    def losses(self) -> Losses:
        """Return the losses of the models that are trained."""
        ...


def combine(shares: Mapping[str, float]) -> dict[str, float]:
    """Turn the added up `LossOutputs.shares` of a mini-batch into metrics: what is logged as it is, and what the shares
    that begin with ``_`` combine to.
    """
    metrics = {name: share for name, share in shares.items() if not name.startswith("_")}
    if "_kl_grad_square" in shares:
        kl, policy = shares["_kl_grad_square"] ** 0.5, shares["_policy_grad_square"] ** 0.5
        metrics["loss/kl_grad_fraction"] = kl / (kl + policy) if kl + policy else 0.0
    if "_value_tokens" in shares:
        returns = _variance(shares["_value_tokens"], shares["_return_sum"], shares["_return_square"])
        errors = _variance(shares["_value_tokens"], shares["_value_error_sum"], shares["_value_error_square"])
        metrics["value/explained_variance"] = 1.0 - errors / returns if returns > 0 else 0.0
    return metrics


def _variance(count: float, total: float, squares: float) -> float:
    return squares / count - (total / count) ** 2 if count else 0.0
