"""What a training step trains on: groups that are generated, graded and admitted; dropped ones are refilled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rlinf_lite.algorithms import Algorithm
from rlinf_lite.cluster.weight_sync import Arriving
from rlinf_lite.data import PromptStream
from rlinf_lite.observability import PhaseTimer
from rlinf_lite.rollout.batches import generation_batches
from rlinf_lite.runner.credit import graded_table, is_graded
from rlinf_lite.runner.generation import Generation
from rlinf_lite.runner.grading import graded
from rlinf_lite.training.batch import SplitSettings, StepRows
from rlinf_lite.types import GenerationBatch, Group, Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """The groups of one training step."""

    groups: list[Group]
    """As many as the step trains on, in canonical order."""
    is_admitted: list[bool]
    """Of each of these groups; the others fill up the step, and are not trained on."""
    candidates: list[Group]
    """Every group that was generated, in canonical order."""
    rows: StepRows
    """Of ``groups``."""

    @property
    def is_counted(self) -> list[bool]:
        """Of each response of ``groups``: it has a grade, and its group is admitted."""
        admitted = [
            admitted for group, admitted in zip(self.groups, self.is_admitted, strict=True) for _ in group.responses
        ]
        return [graded and taken for graded, taken in zip(is_graded(self.groups), admitted, strict=True)]

    @property
    def num_samples(self) -> int:
        """Responses of all candidates."""
        return sum(len(group.responses) for group in self.candidates)

    @property
    def num_tokens(self) -> int:
        """Tokens of these responses, each with its prompt."""
        return sum(
            len(group.prompt.problem.prompt_ids) * len(group.responses)
            + sum(len(response.token_ids) for response in group.responses)
            for group in self.candidates
        )

    @property
    def num_dropped(self) -> int:
        """Candidates that the step was not made of."""
        return len(self.candidates) - sum(self.is_admitted)


@dataclass(kw_only=True)
class StepSource:
    """Samples the groups of training steps. What it draws is a function of the step, the cursor and the grades."""

    generation: Generation
    stream: PromptStream
    algorithm: Algorithm
    num_groups: int
    """Groups per step, ``data.rollout_batch_size``."""
    max_rounds: int
    """Most times that a step draws this many prompts, to replace groups that were not admitted."""
    group_size: int
    sampling: Sampling
    max_rows: int
    """Most responses per generation batch."""
    seed: int
    split: SplitSettings
    """How the step's responses become units."""
    _prepared: tuple[tuple[int, int], list[GenerationBatch]] | None = field(default=None, init=False)
    """What `prepare` made, with its arguments."""

    def prepare(self, step: int, cursor: int) -> int:
        """Make what `sample` will generate first for the same arguments; returns how many engines can `start`."""
        batches = self._batches(step, cursor)
        self._prepared = (step, cursor), batches
        return min(len(batches), self.generation.rollouts.size)

    def start(self, weights: Arriving) -> None:
        """Let engines begin with what was prepared. Does not wait."""
        assert self._prepared is not None
        self.generation.start(self._prepared[1], weights)

    def sample(self, step: int, cursor: int, timer: PhaseTimer) -> Sampled:
        """Generate and grade groups for ``step``, from the prompt at ``cursor`` on, until enough are admitted."""
        candidates: list[Group] = []
        is_admitted: list[bool] = []
        for number in range(self.max_rounds):
            new, rows = self._round(step, cursor + number * self.num_groups, timer)
            candidates += new
            admitted_P = self.algorithm.admit(graded_table(new, is_graded(new), {}, self.sampling.max_new_tokens))
            is_admitted += admitted_P.tolist()
            if sum(is_admitted) >= self.num_groups:
                break
        chosen = self._choose(is_admitted)
        groups = [candidates[index] for index in chosen]
        if rows is None:
            rows = StepRows(groups, step=step, settings=self.split)
        return Sampled(
            groups=groups,
            is_admitted=[is_admitted[index] for index in chosen],
            candidates=candidates,
            rows=rows,
        )

    def _round(self, step: int, cursor: int, timer: PhaseTimer) -> tuple[list[Group], StepRows | None]:
        """The round's groups, and their rows if a step has one round only."""
        with timer.phase("rollout"):
            groups, grading = self.generation.generate(self._batches(step, cursor))
        with timer.phase("reward"):
            # The graders are at work meanwhile.
            rows = StepRows(groups, step=step, settings=self.split) if self.max_rounds == 1 else None
            groups = graded(grading, groups)
        self.generation.check_graded(groups, f"step {step}")
        return groups, rows

    def _batches(self, step: int, cursor: int) -> list[GenerationBatch]:
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared[0] == (step, cursor):
            return prepared[1]
        return generation_batches(
            self.stream.batch(cursor, self.num_groups),
            stream="train",
            step=step,
            group_size=self.group_size,
            sampling=self.sampling,
            seed=self.seed,
            max_rows=self.max_rows,
        )

    def _choose(self, is_admitted: Sequence[bool]) -> list[int]:
        """The first admitted candidates; then, if there are too few, the first of the others."""
        order = sorted(range(len(is_admitted)), key=lambda index: (not is_admitted[index], index))
        return sorted(order[: self.num_groups])
