"""All worker processes of a run: started, replaced one by one, or all restarted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlinf_lite.cluster.errors import WorkerLost
from rlinf_lite.cluster.group import Call, WorkerGroup, wait_all
from rlinf_lite.cluster.session import Session
from rlinf_lite.cluster.spares import Spares
from rlinf_lite.cluster.workers.critic import CriticWorkers
from rlinf_lite.cluster.workers.policy import PolicyWorkers
from rlinf_lite.cluster.workers.records import EngineSetup, TrainerSetup, WeightShapes, WorkerLocation
from rlinf_lite.cluster.workers.reward import RewardWorkers
from rlinf_lite.cluster.workers.rollout import RolloutWorkers
from rlinf_lite.cluster.workers.trainer import Trainers
from rlinf_lite.cluster.workers.warm_up import MODULES_OF_MEGATRON
from rlinf_lite.config import Config, ConfigError
from rlinf_lite.durable import replace_text
from rlinf_lite.observability import log_line
from rlinf_lite.recovery.logprobs import old_from_engine

if TYPE_CHECKING:
    from rlinf_lite.cluster.weight_sync import WeightSync

_RESET_SECONDS = 5.0
"""A living rank drops what it shared with dead ones in this time; one in a collective notices their death sooner."""


class Workers:
    """All groups of workers, their spares, and how weights travel between them."""

    def __init__(
        self,
        trainers: Trainers,
        rollouts: RolloutWorkers,
        rewards: RewardWorkers,
        *,
        spares: Spares,
        session: Session,
        workers_file: Path,
    ) -> None:
        """
        Args:
            workers_file: where `note` writes which process is which worker.
        """
        self.trainers, self.rollouts, self.rewards = trainers, rollouts, rewards
        self.spares, self.session, self._workers_file = spares, session, workers_file
        self._fresh_engines = set(range(rollouts.size))
        self._noted = False

    @property
    def groups(self) -> tuple[WorkerGroup, ...]:
        """Those of the trainers, rollouts, rewards."""
        return *self.trainers.groups, self.rollouts, self.rewards

    # -- setting up

    def set_up(self, checkpoints: str, total_updates: int) -> tuple[TrainerSetup, str]:
        """Build the policy on all ranks, and the engines of rollout workers that have none yet.

        Returns:
            What rank 0 has built; and what all workers compute on.

        Raises:
            ConfigError: the engines' architecture is not the policy's.
        """
        starting = self._start_engines()
        ranks = self.trainers.setup(checkpoints, total_updates)
        engines = self._await_engines(starting)
        _check_weights(ranks[0].weights, engines)
        if not all(engine.comparable for engine in engines):
            log_line("   vLLM's weights are not compared with the actor's after a sync: it keeps them in another form")
        devices = {rank.compute for rank in ranks} | {engine.compute for engine in engines}
        return ranks[0], "; ".join(sorted(devices))

    def set_up_engines(self) -> None:
        """Build the engines of the rollout workers that were replaced."""
        self._await_engines(self._start_engines())

    def _start_engines(self) -> list[Call[EngineSetup]]:
        return [self.rollouts.start_setup(rank) for rank in sorted(self._fresh_engines)]

    def _await_engines(self, starting: Sequence[Call[EngineSetup]]) -> list[EngineSetup]:
        engines = wait_all(starting)
        self._fresh_engines.clear()
        return engines

    def weight_sync(self) -> WeightSync:
        """Build the transport of weights between the workers as they are now."""
        from rlinf_lite.cluster.weight_sync import build_weight_sync

        return build_weight_sync(self.session, self.trainers.policy, self.rollouts, self.rollouts.precision)

    # -- replacing

    def repair_alone(self, weights: Callable[[], WeightSync], admit: Callable[[WorkerLost], None]) -> None:
        """From now on replace lost rollout and reward workers while the step continues.

        Args:
            weights: sends the current ones to a new engine.
            admit: called with each loss; raises if the run must not continue.
        """

        def repair_rollout(lost: WorkerLost) -> None:
            admit(lost)
            self._replace(self.rollouts, lost.rank)
            self.rollouts.require(self.rollouts.start_setup(lost.rank))
            weights().send_to(lost.rank)

        def repair_reward(lost: WorkerLost) -> None:
            admit(lost)
            self._replace(self.rewards, lost.rank)

        self.rollouts.repair, self.rewards.repair = repair_rollout, repair_reward

    def replace_lost(self, losses: Sequence[WorkerLost]) -> None:
        """Start new processes for lost rollout and reward workers; engines get their weights with the next publish.

        Also for engines that were replaced a moment ago: their weights may have been lost with what is lost now.
        """
        for lost in losses:
            if lost.group == self.rewards.name:
                self._replace(self.rewards, lost.rank)
        engines = {lost.rank for lost in losses if lost.group == self.rollouts.name}
        for rank in engines.union(self.rollouts.unready):
            self._replace(self.rollouts, rank)
            self._fresh_engines.add(rank)

    def reset_trainers(self) -> None:
        """Make every rank of both models ready for `set_up`: living ones keep their process, others get a new one."""
        for group, rank in self.trainers.reset(_RESET_SECONDS):
            self._replace(group, rank)

    def rebuild(self) -> None:
        """Replace all processes, on the nodes that the cluster has now."""
        self.kill()
        self.session.reserve()
        self.restart()

    def restart(self) -> None:
        """Replace all processes, each in its slot."""
        for group in self.groups:
            group.respawn()
        self._fresh_engines = set(range(self.rollouts.size))
        self._noted = False

    def _replace(self, group: WorkerGroup, rank: int) -> None:
        group.replace(rank)
        self._noted = False

    def gone(self, seconds: float) -> list[WorkerLost]:
        """Return every worker that is gone, of all groups."""
        return [lost for group in self.groups for lost in group.gone(seconds)]

    def kill(self) -> None:
        """End every process."""
        for group in self.groups:
            group.kill()
        self.spares.kill()

    # -- locations

    def location(self, component: str, rank: int) -> WorkerLocation | None:
        """Return where a worker runs; None if it does not."""
        found = [group for group in self.groups if group.component == component]
        return found[0].location(rank) if found else None

    def note(self) -> None:
        """Write the workers' file, if a process has changed since."""
        if self._noted:
            return
        workers = [
            {
                "group": group.component,
                "rank": rank,
                "pid": location.process.pid,
                "address": location.address,
                "node": location.node_id,
            }
            for group in self.groups
            for rank, location in enumerate(group.locations())
        ]
        text = json.dumps({"driver": os.getpid(), "workers": workers}, indent=1)
        replace_text(self._workers_file, text, durable=False, several_writers=True)
        self._noted = True


def start_workers(config: Config, session: Session, workers_file: Path) -> Workers:
    """Start every process of a run; does not wait until they are up.

    Args:
        workers_file: as for `Workers`; one of an earlier start is removed.
    """
    workers_file.unlink(missing_ok=True)
    actor, algorithm, checkpoint = config.actor, config.algorithm, config.runner.checkpoint
    tokenizer = actor.tokenizer
    modules = MODULES_OF_MEGATRON if actor.training_backend == "megatron" else ()
    spares = Spares(session, "rlinf_lite.cluster.workers.warm_up:warm_up", actor.model, tokenizer, modules)
    sampling, seq_length = algorithm.sampling_params, config.runner.seq_length
    engine = config.rollout
    if old_from_engine(config, session.device):
        engine = engine.model_copy(update={"return_logprobs": True})
    policy = PolicyWorkers(actor, algorithm, checkpoint, session, spares)
    critic = None
    if config.critic.use_critic_model:
        critic = CriticWorkers(config.critic, algorithm, checkpoint, session, spares, seed=actor.seed)
    return Workers(
        Trainers(policy, critic),
        RolloutWorkers(engine, tokenizer, session, spares, sampling=sampling, seq_length=seq_length),
        RewardWorkers(config.reward, session, spares),
        spares=spares,
        session=session,
        workers_file=workers_file,
    )


def _check_weights(policy: WeightShapes, engines: Sequence[EngineSetup]) -> None:
    """Check that the policy publishes what each engine holds: an engine would use a weight that was never sent."""
    for engine in engines:
        if engine.weights != policy:
            differing: Mapping[str, object] = dict(engine.weights.items() ^ policy.items())
            raise ConfigError(
                f"rollout.model.model_path: its architecture is not the actor's ({min(differing)} differs); "
                "use the same directory"
            )
