"""What the checks of the single workers found, and what follows from all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlinf_lite.config import Config
from rlinf_lite.selfcheck.made_up import first_difference
from rlinf_lite.types import Group

_GAP = {"fp32": 1e-3, "bf16": 0.2, "fp16": 0.03}
"""Megatron's layers round differently from the engine's; so may those of FSDP1, whose weights lie elsewhere in memory.
A larger gap has another reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineCheck:
    """What one engine generated, and whether it repeats its bits."""

    groups: list[Group]
    """Responses, with log-probs if ``is_checked``."""
    is_checked: bool = True
    """False: the engine was not asked, the responses are made up."""
    difference: str | None = None
    """Where a repetition differed first; None if nothing did."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateCheck:
    """What one rank of a policy or critic computed, and whether it repeats its bits."""

    values_M: np.ndarray
    """float32: log-probs, or a critic's values, of the tokens of all responses, end to end."""
    difference: str | None = None
    """Where a repetition differed first; None if nothing did."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckResult:
    """The result of a self-check."""

    differences: tuple[str, ...]
    """What did not repeat its bits."""
    mismatch: str | None
    """How the engine's log-probs differ from the trainer's; None if they are equal, or not known."""
    mismatch_is_expected: bool
    """The config lets engine and trainer compute in different types."""
    is_engine_checked: bool
    num_tokens: int
    """Of the responses that were compared."""

    @property
    def is_good(self) -> bool:
        """Nothing differs that the config lets expect equal."""
        return not self.differences and (self.mismatch is None or self.mismatch_is_expected)

    def __str__(self) -> str:
        """One line for the log."""
        reproducible = f"no: {'; '.join(self.differences)}" if self.differences else "yes"
        if not self.is_engine_checked:
            return f"reproducible: {reproducible} (the update; vLLM's generation is not checked)"
        agree = "yes" if self.mismatch is None else f"no: {self.mismatch}"
        agree += ", as this config lets expect" if self.mismatch and self.mismatch_is_expected else ""
        return f"reproducible: {reproducible}; engine and trainer agree: {agree} ({self.num_tokens} tokens compared)"


def by_operation(difference: str, name: str | None) -> str:
    """Add the first operation that differs to a difference; None if no operation alone does."""
    return f"{difference} ({'no operation alone does' if name is None else f'first in the operation {name}'})"


def result_of(
    config: Config,
    engines: Sequence[EngineCheck],
    policy: Sequence[UpdateCheck],
    critic: Sequence[UpdateCheck] = (),
) -> CheckResult:
    """Put together what every rank found: each alone, ranks of a kind with each other, and engine with trainer.

    Args:
        engines, policy, critic: one per rank. All engines got the same batch, all trainers the responses of the first.
    """
    found = [_named(f"rollout rank {rank}", check.difference) for rank, check in enumerate(engines)]
    found += [_unequal_engine(rank, engines[0], check) for rank, check in enumerate(engines)]
    for name, checks in (("actor", policy), ("critic", critic)):
        found += [_named(f"{name} rank {rank}", check.difference) for rank, check in enumerate(checks)]
        found += [_unequal_rank(name, rank, checks[0], check) for rank, check in enumerate(checks)]
    engine = engines[0]
    gap_M = _gap(engine.groups, policy[0].values_M) if engine.is_checked else None
    rounds_apart = config.actor.training_backend == "megatron" or config.actor.fsdp_config.strategy == "fsdp"
    compute = config.actor.fsdp_config.mixed_precision.param_dtype or config.actor.model.precision
    return CheckResult(
        differences=tuple(text for text in found if text is not None),
        mismatch=None if gap_M is None else f"{np.count_nonzero(gap_M)} log-probs differ, by up to {gap_M.max():.1e}",
        mismatch_is_expected=compute != config.rollout.model.precision
        or config.cluster.threads_per_worker > 1
        or (rounds_apart and gap_M is not None and gap_M.max() < _GAP[compute]),
        is_engine_checked=engine.is_checked,
        num_tokens=len(policy[0].values_M),
    )


def _named(worker: str, difference: str | None) -> str | None:
    return None if difference is None else f"{worker}: {difference}"


def _unequal_engine(rank: int, first: EngineCheck, other: EngineCheck) -> str | None:
    where = first_difference(first.groups, other.groups)
    return None if where is None else f"rollout ranks 0 and {rank}: {where} differ"


def _unequal_rank(name: str, rank: int, first: UpdateCheck, other: UpdateCheck) -> str | None:
    if first.values_M.tobytes() == other.values_M.tobytes():
        return None
    return f"{name} ranks 0 and {rank}: the same forward pass gives other values"


def _gap(groups: Sequence[Group], trainer_M: np.ndarray) -> np.ndarray | None:
    """How far the log-probs of engine and trainer are apart; None if they are bitwise identical."""
    rows = [response.logprobs for group in groups for response in group.responses]
    engine_M = np.concatenate([row for row in rows if row is not None])
    return None if engine_M.tobytes() == trainer_M.tobytes() else np.abs(engine_M - trainer_M)
