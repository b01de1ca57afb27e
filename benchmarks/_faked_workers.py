"""The driver's part of a training step with any number of workers, which are faked: they answer at once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from rlinf_lite.algorithms import build_algorithm
from rlinf_lite.cluster.guard import guard
from rlinf_lite.cluster.placement import Placement
from rlinf_lite.cluster.replicas import MemoryReplicas
from rlinf_lite.cluster.spares import Spares
from rlinf_lite.cluster.stacks import Process
from rlinf_lite.cluster.watch import Watch
from rlinf_lite.cluster.weight_sync import ObjectStoreSync
from rlinf_lite.cluster.workers.handle import WorkerHandle
from rlinf_lite.cluster.workers.policy import PolicyWorkers
from rlinf_lite.cluster.workers.records import GeneratedAhead, WorkerLocation
from rlinf_lite.cluster.workers.reward import RewardWorkers
from rlinf_lite.cluster.workers.rollout import RolloutWorkers
from rlinf_lite.cluster.workers.trainer import Trainers
from rlinf_lite.config import Config
from rlinf_lite.data import PromptStream
from rlinf_lite.observability import MetricHub, PhaseTimer
from rlinf_lite.rollout.batches import grouped, rows_per_batch
from rlinf_lite.runner.generation import Generation, Validation
from rlinf_lite.runner.interruption import Interruption
from rlinf_lite.runner.loop import Runner
from rlinf_lite.runner.models import Models
from rlinf_lite.runner.progress import Progress
from rlinf_lite.runner.sampling import StepSource
from rlinf_lite.training.batch import SplitSettings
from rlinf_lite.training.trainer import UnitStats
from rlinf_lite.training.update import UpdateReport
from rlinf_lite.types import Column, GenerationBatch, GradingItem, Group, Problem, RankBatch, Response, Sampling, Score

_TOKENS = 4
_RANKS_PER_ENGINE = 8


@dataclass(eq=False)
class _Answer:
    """A reference to a result that is there."""

    value: Any


class _NoRay:
    """Takes the place of the module ``ray`` in the guard; a wait looks at every reference, as Ray's does."""

    def get(self, ref: _Answer, /) -> Any:
        return ref.value

    def wait(self, refs: list[_Answer], /, *, num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return [*refs[:num_returns]], [*refs[num_returns:]]

    def kill(self, handle: Any, /) -> None: ...


@dataclass
class _Method:
    """``actor.method.remote(...)``."""

    answer: Any
    num_returns: int = 1

    def options(self, num_returns: int) -> _Method:
        return _Method(self.answer, num_returns)

    def remote(self, *args: Any) -> Any:
        value = self.answer(*args)
        return _Answer(value) if self.num_returns == 1 else tuple(map(_Answer, value))


class _FakedActor:
    """One worker process of any kind."""

    def __init__(self, pid: int) -> None:
        where = WorkerLocation(process=Process(pid=pid, created=0.0), node_id="a", address="10.0.0.1")
        self.adopt = _Method(lambda *_: where)
        self.run = _Method(lambda call, *more: _ANSWERS[call[0]](*call[1:], *more))


def _generate(batch: GenerationBatch) -> list[Group]:
    responses = [
        Response(
            sample_index=row % batch.group_size,
            token_ids=np.arange(5, 5 + _TOKENS),
            loss_mask=np.ones(_TOKENS, dtype=bool),
            logprobs=np.full(_TOKENS, -1.0, dtype=np.float32),
            finished=True,
            text="95",
            weights_step=batch.step - 1,
        )
        for row in range(batch.group_size * len(batch.prompts))
    ]
    return grouped(batch, responses)


def _score(items: list[GradingItem]) -> list[Score]:
    return [Score(reward=float(index % 2), correct=bool(index % 2)) for index in range(len(items))]


def _update(step: int, batch: RankBatch, last: bool) -> UpdateReport:
    stats = UnitStats(shares={"loss/policy": 0.1}, token_sums={"policy/entropy": 1.0})
    units = {unit.index: stats for each in batch.rounds for unit in each.units if unit is not None}
    return UpdateReport(units=units, num_tokens=batch.norm.num_tokens, grad_norm=1.0, lr=1e-3, skipped=False)


_ANSWERS: Mapping[str, Any] = {
    "weight_rows": lambda precision: {},
    "row_checksums": lambda precision: {},
    "load_weights": lambda *rows: None,
    "check_weights": lambda step, *sent: None,
    "generate": _generate,
    "generate_ahead": lambda batch, step, *_: GeneratedAhead(rank=0, groups=_generate(batch), weights={}),
    "sleep": lambda: None,
    "score": _score,
    "update": _update,
    "replicate": lambda step, info: ({}, {}),
}


@dataclass
class _Session:
    """Takes the place of a session with Ray, on one node."""

    placement: Placement
    config: Any
    device: str = "cpu"
    watch: Watch = field(default_factory=lambda: Watch(0.0))
    _pid: int = 100

    def start_process(self, name: str, component: str, slots: Any, *args: Any) -> WorkerHandle:
        self._pid += 1
        return WorkerHandle(_FakedActor(self._pid))

    def node_of_slot(self, slot: int) -> str:
        return "a"

    def slot_of_node(self) -> dict[str, int]:
        return {"a": 0}


def driver_seconds(config: Config, num_ranks: int, steps: int) -> float:
    """Median processor seconds of the driver per step, with ``num_ranks`` actor ranks and an engine for each 8."""
    guard.watch(None)
    guard._ray = _NoRay()  # type: ignore[assignment]
    runner = _runner(config, num_ranks)
    runner.generation.rollouts.locations()
    seconds = []
    for _ in range(steps):
        began, timer = time.process_time(), PhaseTimer()
        runner.step(timer)
        runner.throughput(runner.progress.unlogged, timer)
        seconds.append(time.process_time() - began)
        runner.progress.unlogged = {}
    return statistics.median(seconds[1:])


def _runner(config: Config, num_ranks: int) -> Runner:
    settings, ranks = config.algorithm, tuple(range(num_ranks))
    engines = ranks[:: min(_RANKS_PER_ENGINE, num_ranks)]
    session: Any = _Session(Placement(slots={"actor": ranks, "rollout": engines, "reward": (0,)}), config.cluster)
    spares = Spares(session)
    trainers = Trainers(PolicyWorkers(config.actor, settings, config.runner.checkpoint, session, spares))
    sampling = settings.sampling_params
    rollouts = RolloutWorkers(
        config.rollout, config.actor.tokenizer, session, spares, sampling=sampling, seq_length=config.runner.seq_length
    )
    rewards, algorithm = RewardWorkers(config.reward, session, spares), build_algorithm(settings)
    generation = Generation(rollouts=rollouts, rewards=rewards, enable_sleep=False, max_failed_fraction=0.0)
    num_prompts = config.data.rollout_batch_size
    source = StepSource(
        generation=generation,
        stream=PromptStream(_problems(num_prompts), seed=0, shuffle=True),
        algorithm=algorithm,
        num_groups=num_prompts,
        max_rounds=1,
        group_size=settings.group_size,
        sampling=Sampling(**vars(sampling)),
        max_rows=rows_per_batch(
            config.rollout, num_prompts=num_prompts, group_size=settings.group_size, num_workers=len(engines)
        ),
        seed=0,
        split=SplitSettings.of(settings, config.runner, seed=0),
    )
    models = Models(
        policy=trainers.policy,
        critic=None,
        needs=frozenset({*algorithm.needs, Column.ENGINE_LOGPROB}),
        old_from_engine=True,
        engine_is_exact=False,
        critic_warmup_steps=0,
    )
    nothing: Any = SimpleNamespace(run_once=lambda step: None, info={})
    return Runner(
        source=source,
        algorithm=algorithm,
        models=models,
        trainers=trainers,
        generation=generation,
        weights=ObjectStoreSync(trainers.policy, rollouts, "fp32"),
        self_check=nothing,
        replicas=MemoryReplicas(trainers, session),
        validation=Validation(
            problems=(), interval=0, data=config.data, rollout=config.rollout, sampling=sampling, seed=0
        ),
        hub=MetricHub([]),
        samples=None,
        log_rollouts=0,
        progress=Progress(),
        last_step=1 << 30,
        saver=nothing,
        stop=Interruption(30.0),
        between_steps=lambda: None,
    )


def _problems(number: int) -> list[Problem]:
    return [
        Problem(problem_id=index, prompt="57+38=", answer="95", prompt_ids=(1, 7, 9, 3, 5, 10, 4), source="made up")
        for index in range(number)
    ]
