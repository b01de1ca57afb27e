"""A training step in one process, without Ray and without the driver: the workers' own objects, called directly."""

from __future__ import annotations

import tempfile
from typing import Any

from rlinf_lite.algorithms import build_algorithm
from rlinf_lite.cluster.workers.policy_worker import PolicyWorker
from rlinf_lite.cluster.workers.records import RankLayout
from rlinf_lite.cluster.workers.reward_worker import RewardWorker
from rlinf_lite.cluster.workers.rollout_worker import RolloutWorker
from rlinf_lite.config import Config
from rlinf_lite.data import PromptStream, load_problems
from rlinf_lite.models import hf_directory
from rlinf_lite.observability import PhaseTimer
from rlinf_lite.recovery.logprobs import old_from_engine
from rlinf_lite.rewards import attach_scores, generated, grading_items
from rlinf_lite.rollout.batches import generation_batches, join, rows_per_batch
from rlinf_lite.runner.credit import graded_table, is_graded
from rlinf_lite.runner.schedule import total_steps, total_updates
from rlinf_lite.training.batch import SplitSettings, StepBatch, StepRows
from rlinf_lite.training.ranks import shard_mini_batch
from rlinf_lite.types import Column, Group, Sampling
from rlinf_lite.user_code import search_path


class PlainRun:
    """One policy rank, one engine and one grader in this process, for a config like the embedded default."""

    def __init__(self, config: Config) -> None:
        self.config, settings = config, config.algorithm
        cluster, where = config.cluster, search_path()
        engine = config.rollout.model_copy(
            update={"return_logprobs": old_from_engine(config, "cpu") or config.rollout.return_logprobs}
        )
        self._old_from_engine = old_from_engine(config, "cpu")
        self.policy = PolicyWorker(0, 1, config.actor, settings, config.runner.checkpoint, cluster, "cpu", where)
        self.engine = RolloutWorker(0, 1, engine, config.actor.tokenizer, cluster, "cpu")
        self.grader = RewardWorker(0, 1, config.reward, where)
        self.algorithm = build_algorithm(settings)
        self._sampling = Sampling(**vars(settings.sampling_params))
        self._split = SplitSettings.of(settings, config.runner, seed=config.actor.seed)
        tokenizer = hf_directory.load_tokenizer(hf_directory.resolve(config.actor.tokenizer.tokenizer_model))
        problems = load_problems(config.data, "train", tokenizer).problems
        self._stream = PromptStream(problems, seed=config.data.seed, shuffle=config.data.shuffle)
        self._num_prompts = config.data.rollout_batch_size
        self._max_rows = rows_per_batch(
            config.rollout, num_prompts=self._num_prompts, group_size=settings.group_size, num_workers=1
        )
        steps = total_steps(config.runner, num_problems=len(problems), batch=self._num_prompts)
        updates = total_updates(config.actor.optim, steps, settings.n_minibatches)
        self._scratch = tempfile.TemporaryDirectory()
        layout = RankLayout(sizes={"actor": 1})
        self.policy.setup(self.policy.open_store(1), layout, self._scratch.name, updates)
        self.engine.setup(settings.sampling_params, config.runner.seq_length)

    def step(self, step: int, timer: PhaseTimer) -> float:
        """Take one step; return its mean reward, which is the one that the run with Ray logs."""
        with timer.phase("sync"):
            self.publish(step - 1)
        with timer.phase("rollout"):
            groups = self.generate(step)
        with timer.phase("reward"):
            scores = self.grader.score(grading_items(generated(groups)))
            groups = attach_scores(groups, scores)
        self.train(step, groups, timer)
        if self.config.runner.checkpoint.memory_replicas:
            with timer.phase("replica"):
                self._replica = self.policy.replicate(step, {})
        return sum(score.reward for score in scores) / len(scores)

    def publish(self, step: int) -> None:
        """Bring the policy's weights to the engine."""
        precision = self.config.rollout.model.precision
        self.engine.load_weights(self.policy.weight_rows(precision))
        self.engine.check_weights(step, self.policy.row_checksums(precision))

    def generate(self, step: int) -> list[Group]:
        """Sample the step's responses."""
        batches = generation_batches(
            self._stream.batch((step - 1) * self._num_prompts, self._num_prompts),
            stream="train",
            step=step,
            group_size=self.config.algorithm.group_size,
            sampling=self._sampling,
            seed=self.config.actor.seed,
            max_rows=self._max_rows,
        )
        return join(self.engine.generate(batch) for batch in batches)

    def train(self, step: int, groups: list[Group], timer: PhaseTimer) -> None:
        """Assign credit, and take the step's optimizer steps."""
        counted = is_graded(groups)
        batch = StepBatch(StepRows(groups, step=step, settings=self._split), counted)
        columns: dict[Column, Any] = {}
        if self._old_from_engine:
            columns[Column.OLD_LOGPROB] = batch.engine_logprobs()
        credit = self.algorithm.credit(graded_table(groups, counted, columns, self._sampling.max_new_tokens))
        with timer.phase("update"):
            is_trained_N = credit.trained_PG.reshape(-1).numpy()
            minis = batch.for_update({**columns, **credit.columns}, is_trained_N)
            for number, mini in enumerate(minis):
                (mine,) = shard_mini_batch(mini, 1, virtual_ranks=self.config.actor.fsdp_config.virtual_ranks)
                self.policy.update(step, mine, number == len(minis) - 1)

    def close(self) -> None:
        """Leave the process group, so that another run can be made in this process."""
        self.policy.reset()
        self._scratch.cleanup()
