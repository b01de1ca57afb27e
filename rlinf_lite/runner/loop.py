"""The training loop: what one step does, in order. Read this file first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from rlinf_lite.cluster.replicas import MemoryReplicas
from rlinf_lite.cluster.weight_sync import WeightSync
from rlinf_lite.cluster.work_queue import WorkQueue
from rlinf_lite.cluster.workers.policy import PolicyWorkers
from rlinf_lite.cluster.workers.reward import RewardWorkers
from rlinf_lite.cluster.workers.rollout import RolloutWorkers
from rlinf_lite.config import Config
from rlinf_lite.data import PromptStream
from rlinf_lite.data.batching import StepBatch
from rlinf_lite.observability import JsonlSink, MetricHub, PhaseTimer, log_line
from rlinf_lite.rewards import refuse_too_many_ungraded
from rlinf_lite.rollout.batches import generation_batches, join, validation_batches
from rlinf_lite.runner.credit import credit
from rlinf_lite.runner.grading import GradingQueue, in_order, submit
from rlinf_lite.runner.interruption import Interruption
from rlinf_lite.runner.metrics import Metrics, rollout_metrics, update_metrics, validation_metrics
from rlinf_lite.runner.progress import Progress
from rlinf_lite.runner.saving import Saver
from rlinf_lite.runner.schedule import due
from rlinf_lite.types import GenerationBatch, Problem, Prompt, Rollout, Sampling, Score


@dataclass(kw_only=True)
class Runner:
    """Holds what a run needs, which is built elsewhere; `run` trains."""

    config: Config
    actors: PolicyWorkers
    rollouts: RolloutWorkers
    rewards: RewardWorkers
    weights: WeightSync
    replicas: MemoryReplicas | None
    stream: PromptStream
    val_problems: Sequence[Problem]
    hub: MetricHub
    samples: JsonlSink | None
    progress: Progress
    last_step: int
    saver: Saver
    pad_id: int
    stop: Interruption
    between_steps: Callable[[], None]
    """Called when a step is completed and logged, and its save has begun."""
    intact: bool = True
    """Whether the actors hold the state after ``progress.step``; false while an update changes it."""

    def __post_init__(self) -> None:
        self._made: dict[tuple[str, int, int], list[Rollout]] = {}
        self._logged_ungraded = False

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
            prompts = self.stream.batch(self.progress.cursor, self.config.data.rollout_batch_size)
            with timer.phase("rollout"):
                rollouts, grading = self.generate(self.train_batches(prompts, step))
                self.rest()
            with timer.phase("reward"):
                scores = in_order(grading, rollouts)
            self.check_graded(scores, f"step {step}")
            advantages, left_out = credit(rollouts, scores, self.config.algorithm)
            batch = StepBatch(
                rollouts, advantages, step=step, pad_id=self.pad_id, config=self.config, left_out=left_out
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
        if self.val_problems and due(step, self.config.runner.val_check_interval, self.last_step):
            with self.stop.abandonable():
                metrics |= self.validate(timer)
        metrics |= self.saver.poll()
        self.hub.log(step, metrics | timer.metrics() | self.throughput(metrics, timer))
        self.progress.unlogged = {}
        self.saver.between_steps(metrics, self.state)
        self.between_steps()

    def train_batches(self, prompts: Sequence[Prompt], step: int) -> list[GenerationBatch]:
        """Split the prompts of a training step into generation batches."""
        algorithm = self.config.algorithm
        return generation_batches(
            prompts,
            stream="train",
            step=step,
            group_size=algorithm.group_size,
            sampling=Sampling(**vars(algorithm.sampling_params)),
            seed=self.config.actor.seed,
            max_rows=self.config.rollout.max_running_requests,
        )

    def generate(self, batches: Sequence[GenerationBatch]) -> tuple[list[Rollout], GradingQueue]:
        """Generate responses, and hand each batch to the graders as soon as it is finished.

        The responses are in canonical order, whichever worker generated which batch.
        """
        # Batches that were finished before an actor was lost are kept: recovery restores the weights that made them.
        keyed = {(batch.stream, batch.step, batch.prompts[0].prompt_index): batch for batch in batches}
        self._made = {key: made for key, made in self._made.items() if key in keyed}
        generating: WorkQueue[tuple[str, int, int], GenerationBatch, list[Rollout]] = self.rollouts.queue()
        grading: GradingQueue = self.rewards.queue()
        for key, batch in keyed.items():
            if key in self._made:
                submit(grading, batch.prompts, self._made[key])
            else:
                generating.add(key, batch)
        for key, rollouts in generating.results(beside=[grading]):
            self._made[key] = rollouts
            submit(grading, keyed[key].prompts, rollouts)
        return join(self._made[key] for key in keyed), grading

    def rest(self) -> None:
        """Let engines free their GPU memory until the next weights, if the config asks for it."""
        if self.config.rollout.enable_sleep:
            self.rollouts.sleep()

    def check_graded(self, scores: Sequence[Score], what: str) -> None:
        """Raise above ``reward.max_failed_fraction`` ungraded responses; log the first time that one is left out."""
        refuse_too_many_ungraded(scores, self.config.reward.max_failed_fraction, what)
        errors = [score.error for score in scores if not score.graded]
        if errors and not self._logged_ungraded:
            share = f"{len(errors)} of {len(scores)} responses of {what}"
            log_line(f"reward: {share} could not be graded; the first: {errors[0]}")
            self._logged_ungraded = True

    def logprobs(self, batch: StepBatch, timer: PhaseTimer) -> dict[str, list[Any]]:
        """Compute the log-probs that the loss needs from before the update: of the reference, and of the old policy.

        With one mini-batch the policy does not change between a recomputation and its use, so the update's own forward
        pass (detached) is the recomputation.
        """
        algorithm = self.config.algorithm
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
            for batches in validation_batches(
                self.val_problems,
                step=self.progress.step,
                num_samples=1,
                data=self.config.data,
                rollout=self.config.rollout,
                sampling=self.config.algorithm.val_sampling_params,
                seed=self.config.actor.seed,
            ):
                made, grading = self.generate(batches)
                rollouts += made
                scores += in_order(grading, made)
            self.rest()
        self.check_graded(scores, f"the validation after step {self.progress.step}")
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
        limit = self.config.runner.logger.log_rollouts
        pairs = list(zip(rollouts, scores, strict=True))[: None if limit < 0 else limit]
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
