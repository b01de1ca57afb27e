"""Every process of the run besides the driver: started, mended one by one, or taken down and built again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlinf_lite.cluster.errors import WorkerLost
from rlinf_lite.cluster.group import WorkerGroup
from rlinf_lite.cluster.session import Session
from rlinf_lite.cluster.shell import WorkerLocation
from rlinf_lite.cluster.spares import Spares
from rlinf_lite.config import Config, ConfigError
from rlinf_lite.durable import replace_text
from rlinf_lite.rewards import search_path

if TYPE_CHECKING:
    from rlinf_lite.cluster.weight_sync import WeightSync

_RESET_SECONDS = 5.0
"""How long a rank that lives may take to let go of its dead neighbours; one in a collective hears of them sooner."""


class Workers:
    """The worker groups, their spares, and how weights travel between them."""

    def __init__(self, config: Config, session: Session, workers_file: Path) -> None:
        """Starts every process; returns before they are up.

        Args:
            workers_file: where `note` writes who is where.
        """
        self.config, self.session, self._workers_file = config, session, workers_file
        workers_file.unlink(missing_ok=True)  # of an earlier start
        self.spares = Spares(session, "rlinf_lite.cluster.warm_up:warm_up", config)
        actor, rollout, reward = config.actor.group_name, config.rollout.group_name, config.reward.group_name
        self.actors = self._group(actor, "actor", "actor_worker:ActorWorker", config, session.device)
        self.rollouts = self._group(rollout, "rollout", "rollout_worker:RolloutWorker", config, session.device)
        self.rewards = self._group(reward, "reward", "reward_worker:RewardWorker", config.reward, search_path())
        self._fresh_engines = set(range(self.rollouts.size))
        self._noted = False

    def _group(self, name: str, component: str, target: str, *args: Any) -> WorkerGroup:
        return WorkerGroup(name, component, f"rlinf_lite.cluster.{target}", self.session, self.spares, *args)

    @property
    def groups(self) -> tuple[WorkerGroup, ...]:
        return self.actors, self.rollouts, self.rewards

    # -- bringing up

    def bring_up(self, checkpoints: str, total_updates: int) -> tuple[dict[str, Any], str]:
        """Build the actors' models, and the engines of rollout workers that have none yet.

        Returns:
            What rank 0 says of the model; and what all of them compute on.

        Raises:
            ConfigError: the engines' architecture is not the actors'.
        """
        engines = self._start_engines()
        address = self.actors.call_one(0, "rendezvous")
        ranks = self.actors.call("setup", address, checkpoints, total_updates)
        workers = self._await_engines(engines)
        _check_weights(ranks[0]["weights"], workers)
        return ranks[0], "; ".join(sorted({worker["compute"] for worker in [*ranks, *workers]}))

    def bring_up_engines(self) -> None:
        """Only the rollout workers that were replaced."""
        self._await_engines(self._start_engines())

    def _start_engines(self) -> dict[int, Any]:
        return {rank: self.rollouts.start_one(rank, "setup") for rank in sorted(self._fresh_engines)}

    def _await_engines(self, engines: dict[int, Any]) -> list[dict[str, Any]]:
        workers = [self.rollouts.await_one(ref, rank) for rank, ref in engines.items()]
        self._fresh_engines.clear()
        return workers

    def weight_sync(self) -> WeightSync:
        """A new road for weights, between the workers as they are now."""
        from rlinf_lite.cluster.weight_sync import build_weight_sync

        return build_weight_sync(self.session, self.actors, self.rollouts, self.config.rollout.model.precision)

    # -- mending

    def mend_alone(self, weights: Callable[[], WeightSync], admit: Callable[[WorkerLost], None]) -> None:
        """From now on rollout and reward workers that are lost are replaced on the spot.

        Args:
            weights: brings the current ones to a new engine.
            admit: told of each loss; raises if the run shall not go on.
        """

        def rollout(lost: WorkerLost) -> None:
            admit(lost)
            self._replace(self.rollouts, lost.rank)
            self.rollouts.prepare_one(lost.rank, "setup")
            weights().bring(lost.rank)

        def reward(lost: WorkerLost) -> None:
            admit(lost)
            self._replace(self.rewards, lost.rank)

        self.rollouts.mend, self.rewards.mend = rollout, reward

    def replace_lost(self, losses: Sequence[WorkerLost]) -> None:
        """New processes for rollout and reward workers; engines get their weights with the next publish."""
        for lost in losses:
            if lost.group == self.rewards.name:
                self._replace(self.rewards, lost.rank)
            elif lost.group == self.rollouts.name:
                self._replace(self.rollouts, lost.rank)
                self._fresh_engines.add(lost.rank)

    def reset_actors(self) -> None:
        """Every actor rank can be set up again: those that live keep their process, the others get a new one."""
        for rank in self.actors.reset(_RESET_SECONDS):
            self._replace(self.actors, rank)

    def rebuild(self) -> None:
        """All processes new, on the nodes that the cluster has now."""
        self.kill()
        self.session.reserve()
        self.restart()

    def restart(self) -> None:
        """All processes new, where the old ones were."""
        for group in self.groups:
            group.respawn()
        self._fresh_engines = set(range(self.rollouts.size))
        self._noted = False

    def _replace(self, group: WorkerGroup, rank: int) -> None:
        group.replace(rank)
        self._noted = False

    def gone(self, seconds: float) -> list[WorkerLost]:
        """Every worker that is gone, of all groups."""
        return [lost for group in self.groups for lost in group.gone(seconds)]

    def kill(self) -> None:
        """End every process, by handle."""
        for group in self.groups:
            group.kill()
        self.spares.kill()

    # -- who is where

    def location(self, component: str, rank: int) -> WorkerLocation | None:
        """Where a worker lives, if it does."""
        found = [group for group in self.groups if group.component == component]
        return found[0].location(rank) if found else None

    def note(self) -> None:
        """Write the workers' file, if it does not say any more what is."""
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


def _check_weights(actor: dict[str, Any], workers: list[dict[str, Any]]) -> None:
    """What the actor publishes must be what each engine holds: a weight never sent would be whatever was in memory."""
    for worker in workers:
        if worker["weights"] != actor:
            differing = sorted(dict(worker["weights"].items() ^ actor.items()))
            raise ConfigError(
                f"rollout.model.model_path: its architecture is not the actor's ({differing[0]} differs); "
                "use the same directory"
            )
