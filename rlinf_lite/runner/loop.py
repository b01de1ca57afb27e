"""The training loop: what one step does, in order. Read this file first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from rlinf_lite.algorithms import Algorithm
from rlinf_lite.cluster.replicas import MemoryReplicas
from rlinf_lite.cluster.weight_sync import WeightSync
from rlinf_lite.cluster.workers.trainer import Trainers
from rlinf_lite.observability import JsonlSink, MetricHub, PhaseTimer
from rlinf_lite.runner.credit import graded_table
from rlinf_lite.runner.generation import Generation, Validation
from rlinf_lite.runner.grading import graded
from rlinf_lite.runner.interruption import Interruption
from rlinf_lite.runner.metrics import (
    Metrics,
    actor_memory,
    mfu,
    rollout_metrics,
    sampling_metrics,
    update_metrics,
    validation_metrics,
)
from rlinf_lite.runner.models import Models
from rlinf_lite.runner.progress import Progress
from rlinf_lite.runner.sampling import StepSource
from rlinf_lite.runner.saving import Saver
from rlinf_lite.runner.self_check import SelfCheck
from rlinf_lite.training.batch import StepBatch
from rlinf_lite.types import Group, Prompt, Response


@dataclass(kw_only=True)
class Runner:
    """Holds what a run needs, which is built elsewhere; `run` trains."""

    source: StepSource
    algorithm: Algorithm
    models: Models
    trainers: Trainers
    generation: Generation
    weights: WeightSync
    self_check: SelfCheck
    replicas: MemoryReplicas | None
    validation: Validation
    hub: MetricHub
    samples: JsonlSink | None
    log_rollouts: int
    """Responses per step that are written to ``samples``; -1: all."""
    progress: Progress
    last_step: int
    saver: Saver
    stop: Interruption
    between_steps: Callable[[], None]
    """Called when a step is completed and logged, and its save has begun."""
    intact: bool = True
    """Whether the trainers hold the state after ``progress.step``; false while an update changes it."""
    _measured: Metrics = field(default_factory=dict, init=False)
    """Speed and memory of the last update in this process, until its row is written: no part of a state."""

    def run(self) -> None:
        """Train until ``last_step`` steps are completed, or the time is up."""
        self.saver.settle(self.state)
        while not self.done:
            timer = PhaseTimer()
            if not self.progress.unlogged:
                self.step(timer)
            self.conclude(timer)
        self.saver.drain()

    @property
    def done(self) -> bool:
        return self.saver.stopped or (self.progress.step >= self.last_step and not self.progress.unlogged)

    def step(self, timer: PhaseTimer) -> None:
        """Run one step, from publishing weights to the completed update. All before the update may be abandoned."""
        step = self.progress.step + 1
        with self.stop.abandonable():
            with timer.phase("sync"), self.trainers.watched():
                self.weights.publish(step - 1)
            self.self_check.run_once(step - 1)
            with self.trainers.watched(self._an_engine_waits):
                sampled = self.source.sample(step, self.progress.cursor, timer)
            with timer.phase("rollout"):
                self.generation.rest()
            batch = StepBatch(sampled.rows, sampled.is_counted)
            columns = self.models.columns(batch, timer)
            max_tokens = self.source.sampling.max_new_tokens
            credit = self.algorithm.credit(graded_table(sampled.groups, sampled.is_counted, columns, max_tokens))
        self.intact = False
        with timer.phase("update"), self.trainers.watched():
            is_trained_N = credit.trained_PG.reshape(-1).numpy()
            columns |= credit.columns
            after = self.progress.after_step(
                num_prompts=len(sampled.candidates), num_samples=sampled.num_samples, num_tokens=sampled.num_tokens
            )
            reports = self.models.update(step, batch, columns, is_trained_N, then=lambda: self._after_update(after))
        after.unlogged = (
            rollout_metrics(sampled.candidates)
            | (sampling_metrics(len(sampled.candidates), sampled.num_dropped) if self.source.max_rounds > 1 else {})
            | dict(credit.metrics)
            | update_metrics(reports.policy)
            | update_metrics(reports.critic, prefix="critic")
            | {
                "progress/epoch": self.source.stream.epoch_of(sampled.candidates[-1].prompt.prompt_index),
                "progress/samples": after.num_samples,
                "progress/tokens": after.num_tokens,
                "progress/step_tokens": sampled.num_tokens,
            }
        )
        self._measured = mfu(reports.policy, timer.seconds["update"]) | actor_memory(reports.policy, reports.critic)
        self.models.check_gap(step, after.unlogged)
        self.complete(after, timer)
        self.log_samples(step, sampled.candidates)

    def _an_engine_waits(self) -> bool:
        """Whether a replaced engine waits for weights; if none does, a rank that dies does not end the rollout."""
        return bool(self.generation.rollouts.unready)

    def _after_update(self, after: Progress) -> None:
        """Ask for what follows the update: engines load its weights and generate for the next step, while the state is
        copied and the row is written.

        If the update fails, nothing of this is used: no engine generates, a recovery builds another `WeightSync`, and
        replicas are held by `complete` only.
        """
        step, is_last, alone = after.step, after.step == self.last_step, self.models.critic is None
        # A critic's update, and what it keeps in memory, may not have ended yet.
        may_begin = alone and not is_last and not self.generation.enable_sleep
        may_begin = may_begin and not self.validation.is_due(step, self.last_step)
        num_ahead = self.source.prepare(step + 1, after.cursor) if may_begin else 0
        weights = None if is_last else self.weights.start(step, num_ahead)
        if self.replicas is not None and alone:
            # With a critic, ranks of one model would wait in it for the update of the other.
            self.replicas.start(step, self.saver.info)
        if weights is not None and num_ahead:
            self.source.start(weights)

    def complete(self, after: Progress, timer: PhaseTimer) -> None:
        """Complete the step; with replicas only when its state is held in memory, since nothing can undo it then."""
        if self.replicas is not None:
            with timer.phase("replica"):
                self.replicas.take(after.step, self.state(after), self.saver.info)
        self.progress.become(after)
        self.intact = True

    def conclude(self, timer: PhaseTimer) -> None:
        """Validate if due, write the row of the completed step, and begin a save if due."""
        step, metrics = self.progress.step, dict(self.progress.unlogged)
        if self.validation.is_due(step, self.last_step):
            with self.stop.abandonable():
                metrics |= self.validate(timer)
        metrics |= self.saver.poll()
        self.hub.log(step, metrics | timer.metrics() | self.throughput(metrics, timer))
        self.progress.unlogged = {}
        self.saver.between_steps(metrics, self.state)
        self.between_steps()

    def validate(self, timer: PhaseTimer) -> Metrics:
        """Answer every validation problem with the weights after this step; return the metrics."""
        groups: list[Group] = []
        with timer.phase("validation"):
            with self.trainers.watched():
                self.weights.publish(self.progress.step)
            with self.trainers.watched(self._an_engine_waits):
                for batches in self.validation.batches(self.progress.step):
                    made, grading = self.generation.generate(batches)
                    groups += graded(grading, made)
            self.generation.rest()
        self.generation.check_graded(groups, f"the validation after step {self.progress.step}")
        metrics = validation_metrics(groups)
        self.progress.validated(metrics["val/accuracy"])
        return metrics

    def state(self, progress: Progress | None = None) -> dict[str, Any]:
        """Return the driver's part of a checkpoint; with ``progress`` instead of the run's own, if given."""
        return {"progress": (progress or self.progress).state(), "observability": dict(self.hub.state())}

    def flush(self) -> None:
        """Make every row written so far durable."""
        self.hub.sync()
        if self.samples is not None:
            self.samples.sync()

    def throughput(self, metrics: Metrics, timer: PhaseTimer) -> Metrics:
        """Return speed and memory of the step that just ended; of its update only if this process saw it."""
        seconds = timer.metrics()["time/step"] - timer.seconds.get("validation", 0.0)
        speed, slots = metrics["progress/step_tokens"] / seconds, self.trainers.policy.slots
        measured, self._measured = self._measured, {}
        return {
            **measured,
            "throughput/tokens_per_second": speed,
            "throughput/tokens_per_second_per_slot": speed / len(slots | self.generation.rollouts.slots),
            "memory/driver_gb": psutil.Process().memory_info().rss / 1e9,
        }

    def log_samples(self, step: int, groups: Sequence[Group]) -> None:
        """Log the first responses of the step, with their prompts and tokens."""
        if self.samples is None:
            return
        pairs = [(group.prompt, response) for group in groups for response in group.responses]
        limit = None if self.log_rollouts < 0 else self.log_rollouts
        self.samples.log_rows(step, (_sample_row(prompt, response) for prompt, response in pairs[:limit]))


def _sample_row(prompt: Prompt, response: Response) -> dict[str, Any]:
    score = response.score
    assert score is not None
    return {
        "prompt_id": prompt.prompt_index,
        "sample": response.sample_index,
        "prompt_ids": list(prompt.problem.prompt_ids),
        "response_ids": response.token_ids.tolist(),
        "prompt": prompt.problem.prompt,
        "text": response.text,
        "reward": score.reward if score.graded else None,
        **{f"reward/{name}": value for name, value in score.parts.items()},
        "error": score.error,
    }
