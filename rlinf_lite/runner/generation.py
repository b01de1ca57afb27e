"""Generates responses on the rollout workers and has them graded meanwhile, for training steps and validations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rlinf_lite.cluster.errors import LostError
from rlinf_lite.cluster.group import Call, wait_all
from rlinf_lite.cluster.weight_sync import Arriving
from rlinf_lite.cluster.work_queue import WorkQueue
from rlinf_lite.cluster.workers.records import Generated, GeneratedAhead
from rlinf_lite.cluster.workers.reward import RewardWorkers
from rlinf_lite.cluster.workers.rollout import RolloutWorkers
from rlinf_lite.config import DataConfig, RolloutConfig, SamplingConfig
from rlinf_lite.errors import WeightsDiffer
from rlinf_lite.observability import log_line
from rlinf_lite.rewards import refuse_too_many_ungraded
from rlinf_lite.rollout.batches import join, validation_batches
from rlinf_lite.runner.grading import GradingQueue, submit
from rlinf_lite.runner.metrics import scores_of
from rlinf_lite.runner.schedule import due
from rlinf_lite.types import GenerationBatch, Group, Problem

_Key = tuple[str, int, int]
"""Names a generation batch: its stream, its step, and the index of its first prompt."""


def _key(batch: GenerationBatch) -> _Key:
    return batch.stream, batch.step, batch.prompts[0].prompt_index


@dataclass(kw_only=True)
class Generation:
    """The engines and the graders, which work side by side."""

    rollouts: RolloutWorkers
    rewards: RewardWorkers
    enable_sleep: bool
    """As ``rollout.enable_sleep``."""
    max_failed_fraction: float
    """As ``reward.max_failed_fraction``."""

    def __post_init__(self) -> None:
        self._made: dict[_Key, list[Group]] = {}
        self._begun: dict[_Key, Call[Generated]] = {}
        self._arriving: Arriving | None = None
        self._logged_ungraded = False

    def start(self, batches: Sequence[GenerationBatch], weights: Arriving) -> None:
        """Give engines the first batches that `generate`, called next, will ask them for. Does not wait.

        Args:
            weights: what they generate with.
        """
        self._arriving = weights
        self._begun = {
            _key(batch): self.rollouts.start_generate_ahead(rank, batch, weights.step, arrived)
            for rank, (batch, arrived) in enumerate(zip(batches, weights.arrived, strict=False))
        }

    def forget_started(self) -> None:
        """Ask for all batches again: the weights that `start` counted on may never have come."""
        self._begun = {}

    def generate(self, batches: Sequence[GenerationBatch]) -> tuple[list[Group], GradingQueue]:
        """Generate responses, and hand each batch to the graders as soon as it is finished.

        The groups are in canonical order, whichever worker generated which batch.
        """
        # Batches that were finished before an actor was lost are kept: recovery restores the weights that made them.
        keyed = {_key(batch): batch for batch in batches}
        self._made = {key: made for key, made in self._made.items() if key in keyed}
        begun, self._begun = {key: call for key, call in self._begun.items() if key in keyed and call.is_current}, {}
        generating: WorkQueue[_Key, GenerationBatch, Generated] = self.rollouts.queue()
        grading: GradingQueue = self.rewards.queue()
        for key, call in begun.items():
            generating.add_begun(key, keyed[key], call)
        for key, batch in keyed.items():
            if key in self._made:
                submit(grading, self._made[key], self.rewards.items_per_call)
            elif key not in begun:
                generating.add(key, batch)
        try:
            for key, made in generating.results(beside=[grading]):
                groups = self._made[key] = self._compared(made)
                submit(grading, groups, self.rewards.items_per_call)
        except (LostError, WeightsDiffer):
            raise
        except Exception:
            self._compare_ended(begun.values())  # wrong weights may be the cause
            raise
        return join(self._made[key] for key in keyed), grading

    def _compared(self, made: Generated) -> list[Group]:
        """Responses whose weights are those that the policy sent. Raises `WeightsDiffer`."""
        if not isinstance(made, GeneratedAhead):
            return made
        assert self._arriving is not None
        self._arriving.compare(f"{self.rollouts.name} rank {made.rank}", made.weights)
        return made.groups

    def _compare_ended(self, begun: Iterable[Call[Generated]]) -> None:
        """Let engines whose call has returned or failed compare the weights that they generated with."""
        for call in begun:
            if call.is_current and call.is_done and self._arriving is not None:
                weights = self._arriving
                wait_all([self.rollouts.start_check_weights_on(call.rank, weights.step, weights.sums)])

    def rest(self) -> None:
        """Let engines free their GPU memory until the next weights, if the config asks for it."""
        if self.enable_sleep:
            self.rollouts.sleep()

    def check_graded(self, groups: Sequence[Group], what: str) -> None:
        """Raise above ``max_failed_fraction`` ungraded responses; log the first time that one is left out."""
        scores = scores_of(groups)
        refuse_too_many_ungraded(scores, self.max_failed_fraction, what)
        errors = [score.error for score in scores if not score.graded]
        if errors and not self._logged_ungraded:
            share = f"{len(errors)} of {len(scores)} responses of {what}"
            log_line(f"reward: {share} could not be graded; the first: {errors[0]}")
            self._logged_ungraded = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """The problems that validations answer, when, and how."""

    problems: Sequence[Problem]
    """Empty if nothing is validated."""
    interval: int
    """Steps between validations, as `due` reads it."""
    data: DataConfig
    rollout: RolloutConfig
    sampling: SamplingConfig
    seed: int

    def is_due(self, step: int, last_step: int) -> bool:
        """Return whether a validation follows ``step``."""
        return bool(self.problems) and due(step, self.interval, last_step)

    def batches(self, step: int) -> list[list[GenerationBatch]]:
        """As `validation_batches`, one response per problem."""
        return validation_batches(
            self.problems,
            step=step,
            num_samples=1,
            data=self.data,
            rollout=self.rollout,
            sampling=self.sampling,
            seed=self.seed,
        )
