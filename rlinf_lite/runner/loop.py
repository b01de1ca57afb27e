"""The training loop: what one step does, in order. Read this file first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from rlinf_lite.cluster.replicas import MemoryReplicas
from rlinf_lite.cluster.weight_sync import WeightSync
from rlinf_lite.cluster.workers.policy import PolicyWorkers
from rlinf_lite.config import AlgorithmConfig
from rlinf_lite.data import PromptStream
from rlinf_lite.data.batching import Batching, StepBatch
from rlinf_lite.observability import JsonlSink, MetricHub, PhaseTimer
from rlinf_lite.rollout.batches import generation_batches
from rlinf_lite.runner.credit import credit
from rlinf_lite.runner.generation import Generation, Validation
from rlinf_lite.runner.grading import in_order
from rlinf_lite.runner.interruption import Interruption
from rlinf_lite.runner.metrics import Metrics, rollout_metrics, update_metrics, validation_metrics
from rlinf_lite.runner.progress import Progress
from rlinf_lite.runner.saving import Saver
from rlinf_lite.types import GenerationBatch, Prompt, Rollout, Sampling, Score


@dataclass(kw_only=True)
class Runner:
    """Holds what a run needs, which is built elsewhere; `run` trains."""

    algorithm: AlgorithmConfig
    batching: Batching
    num_prompts: int
    """Prompts per step."""
    max_rows: int
    """Most responses per generation batch."""
    seed: int
    """Of sampling."""
    actors: PolicyWorkers
    generation: Generation
    weights: WeightSync
    replicas: MemoryReplicas | None
    stream: PromptStream
    validation: Validation
    hub: MetricHub
    samples: JsonlSink | None
    log_rollouts: int
    """Responses per step that are written to ``samples``; -1: all."""
    progress: Progress
    last_step: int
    saver: Saver
    pad_id: int
    stop: Interruption
    between_steps: Callable[[], None]
    """Called when a step is completed and logged, and its save has begun."""
    intact: bool = True
    """Whether the actors hold the state after ``progress.step``; false while an update changes it."""

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
            with timer.phase("sync"):
                self.weights.publish()
            prompts = self.stream.batch(self.progress.cursor, self.num_prompts)
            with timer.phase("rollout"):
                rollouts, grading = self.generation.generate(self.train_batches(prompts, step))
                self.generation.rest()
            with timer.phase("reward"):
                scores = in_order(grading, rollouts)
            self.generation.check_graded(scores, f"step {step}")
            advantages, left_out = credit(rollouts, scores, self.algorithm)
            batch = StepBatch(
                rollouts, advantages, step=step, pad_id=self.pad_id, batching=self.batching, left_out=left_out
            )
            logprobs = self.logprobs(batch, timer)
        self.intact = False
        with timer.phase("update"):
            *earlier, last = batch.for_update(logprobs)
            reports = [self.actors.update(step, minibatch, last=False) for minibatch in earlier]
            reports.append(self.actors.update(step, last, last=True))
        num_tokens = sum(len(r.prompt_ids) + len(r.response_ids) for r in rollouts)
        after = self.progress.after_step(num_prompts=len(prompts), num_samples=len(rollouts), num_tokens=num_tokens)
        after.unlogged = (
            rollout_metrics(rollouts, scores)
            | update_metrics(reports)
            | {
                "progress/epoch": self.stream.epoch_of(prompts[-1].prompt_index),
                "progress/samples": after.num_samples,
                "progress/tokens": after.num_tokens,
                "progress/step_tokens": num_tokens,
            }
        )
        self.complete(after, timer)
        self.log_samples(step, prompts, rollouts, scores)

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

    def train_batches(self, prompts: Sequence[Prompt], step: int) -> list[GenerationBatch]:
        """Split the prompts of a training step into generation batches."""
        return generation_batches(
            prompts,
            stream="train",
            step=step,
            group_size=self.algorithm.group_size,
            sampling=Sampling(**vars(self.algorithm.sampling_params)),
            seed=self.seed,
            max_rows=self.max_rows,
        )

    def logprobs(self, batch: StepBatch, timer: PhaseTimer) -> dict[str, list[Any]]:
        """Compute the log-probs that the loss needs from before the update: of the reference, and of the old policy.

        With one mini-batch the policy does not change between a recomputation and its use, so the update's own forward
        pass (detached) is the recomputation.
        """
        algorithm = self.algorithm
        found: dict[str, list[Any]] = {}
        if not algorithm.recompute_logprobs:
            found["old_logprobs_BT"] = [rollout.logprobs for rollout in batch.rollouts]
        recompute = algorithm.recompute_logprobs and algorithm.n_minibatches > 1
        wanted = {"old_logprobs_BT": False} if recompute else {}
        if algorithm.kl_beta:
            wanted["ref_logprobs_BT"] = True
        if not wanted:
            return found
        with timer.phase("logprob"):
            rows, micro_batches = batch.for_logprobs()
            for field, of_reference in wanted.items():
                found[field] = batch.by_row(rows, self.actors.logprobs(micro_batches, reference=of_reference))
        return found

    def validate(self, timer: PhaseTimer) -> Metrics:
        """Answer every validation problem with the weights after this step; return the metrics."""
        with timer.phase("validation"):
            self.weights.publish()
            rollouts, scores = [], []
            for batches in self.validation.batches(self.progress.step):
                made, grading = self.generation.generate(batches)
                rollouts += made
                scores += in_order(grading, made)
            self.generation.rest()
        self.generation.check_graded(scores, f"the validation after step {self.progress.step}")
        metrics = validation_metrics(rollouts, scores)
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
        """Return speed and memory of the step that just ended."""
        seconds = timer.metrics()["time/step"] - timer.seconds.get("validation", 0.0)
        return {
            "throughput/tokens_per_second": metrics["progress/step_tokens"] / seconds,
            "memory/driver_gb": psutil.Process().memory_info().rss / 1e9,
            "memory/actor_gb": max(self.actors.memory()),
        }

    def log_samples(
        self, step: int, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], scores: Sequence[Score]
    ) -> None:
        """Log the first responses of the step, with their prompts and tokens."""
        if self.samples is None:
            return
        pairs = list(zip(rollouts, scores, strict=True))[: None if self.log_rollouts < 0 else self.log_rollouts]
        texts = {prompt.prompt_index: prompt.problem.prompt for prompt in prompts}
        self.samples.log_rows(step, (_sample_row(texts[r.prompt_index], r, score) for r, score in pairs))


def _sample_row(prompt: str, rollout: Rollout, score: Score) -> dict[str, Any]:
    return {
        "prompt_id": rollout.prompt_index,
        "sample": rollout.sample_index,
        "prompt_ids": rollout.prompt_ids.tolist(),
        "response_ids": rollout.response_ids.tolist(),
        "prompt": prompt,
        "text": rollout.text,
        "reward": score.reward if score.graded else None,
        "error": score.error,
    }
