"""Ranks of the models that are trained as the driver calls them, and what is done with all of them together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from rlinf_lite.cluster.errors import WorkerLost
from rlinf_lite.cluster.group import DEAD_SECONDS, Call, WorkerGroup, wait_all, wait_all_lists
from rlinf_lite.cluster.workers.critic import CriticWorkers
from rlinf_lite.cluster.workers.policy import PolicyWorkers
from rlinf_lite.cluster.workers.records import RankLayout, TrainerSetup
from rlinf_lite.selfcheck.records import UpdateCheck
from rlinf_lite.types import Group

if TYPE_CHECKING:  # imports torch, which the driver does later
    from rlinf_lite.checkpoint import LoadReport, SaveError, SaveReport

Files = dict[str, np.ndarray]
"""Checkpoint files in memory: uint8 [num_bytes] by name."""


class Trainers:
    """The policy, and the critic if there is one: what they share is set up, saved, loaded and replicated together.

    Results are those of the policy's ranks, then of the critic's. Methods wait, and raise as `wait_all`.
    """

    def __init__(self, policy: PolicyWorkers, critic: CriticWorkers | None = None) -> None:
        self.policy, self.critic = policy, critic

    @property
    def groups(self) -> tuple[WorkerGroup, ...]:
        """The policy's, then the critic's."""
        return (self.policy,) if self.critic is None else (self.policy, self.critic)

    @property
    def layout(self) -> RankLayout:
        """How many ranks each has now."""
        return RankLayout(sizes={group.component: group.size for group in self.groups})

    def setup(self, checkpoints: str, total_updates: int) -> list[TrainerSetup]:
        """Connect all ranks, and build, shard and fill the models.

        Args:
            checkpoints: directory, absolute, or a storage's address.
            total_updates: optimizer steps of the whole run.
        """
        layout = self.layout
        (address,) = wait_all([self.policy.start_one(0, "open_store", layout.num_ranks)])
        return self._call("setup", address, layout, checkpoints, total_updates)

    def reset(self, seconds: float) -> list[tuple[WorkerGroup, int]]:
        """Let every rank drop what it shares with the others; return the ranks that did not, within ``seconds``."""
        calls = [(group, group.start("reset")) for group in self.groups]
        return [(group, rank) for group, started in calls for rank in group.failed(started, seconds)]

    def gone(self, seconds: float = DEAD_SECONDS) -> list[WorkerLost]:
        """Return every rank that is gone; asks each group for ``seconds``."""
        return [lost for group in self.groups for lost in group.gone(seconds)]

    @contextmanager
    def watched(self, when: Callable[[], object] = lambda: True) -> Iterator[None]:
        """Within: some seconds after a rank has died, a wait for any worker ends with `WorkerLost`.

        Ranks that wait for a dead one may never answer, nor may engines that wait for weights from them.

        Args:
            when: ranks are looked at only while this returns true.
        """

        def check() -> None:
            if when():
                for group in self.groups:
                    group.check()

        watch = self.policy.watch
        watch.rarely.append(check)
        try:
            yield
        finally:
            watch.rarely = [other for other in watch.rarely if other is not check]

    def _call(self, method: str, *args: Any) -> list[Any]:
        return wait_all([call for group in self.groups for call in group.start(method, *args)])

    # -- checkpoints

    def save(self, step: int, data: Mapping[str, Any], info: Mapping[str, Any]) -> list[SaveReport]:
        """Write a checkpoint; return when it is committed."""
        return self._call("save", step, data, info)

    def start_save(self, step: int, data: Mapping[str, Any], info: Mapping[str, Any]) -> list[float]:
        """Begin a save; return the seconds that each rank needed for that."""
        return self._call("start_save", step, data, info)

    def poll_save(self) -> list[SaveReport | SaveError | None]:
        """Return how the save in flight ended on each rank, once; None for a rank on which it has not ended."""
        return self._call("poll_save")

    def finish_save(self) -> list[SaveReport | SaveError | None]:
        """Wait for the save in flight, then as `poll_save`; None for a rank that has reported its end before."""
        return self._call("finish_save")

    def load(self, path: str, verify: str) -> LoadReport:
        """Load a checkpoint; return the first rank's report. Raises CheckpointError."""
        report: LoadReport = self._call("load", path, verify)[0]
        return report

    def load_weights(self, path: str, verify: str) -> LoadReport:
        """Load only the policy's model of a checkpoint; return the first rank's report. Raises CheckpointError."""
        report: LoadReport = self._call("load_weights", path, verify)[0]
        return report

    def start_replicas(self, step: int, info: Mapping[str, Any]) -> tuple[list[Call[Files]], list[Call[Files]]]:
        """Copy the state into memory. Per rank: the small files, which only the first rank has, and the shard."""
        pairs = [group.start_in_two("replicate", step, info) for group in self.groups]
        return [call for small, _ in pairs for call in small], [call for _, shards in pairs for call in shards]

    def load_replicas(self, step: int, small: Files, shards: Sequence[Call[Files]]) -> LoadReport:
        """Load what `start_replicas` of another number of ranks may have copied; return the first rank's report.

        Raises:
            CheckpointError: the copy is damaged.
        """
        from rlinf_lite.checkpoint.layout import METADATA  # imports what a driver does not need at its start

        calls = []
        for group in self.groups:
            refs = [shard.ref for shard in shards if shard.group.component == group.component]
            # Files of another layout than DCP's do not say which rank needs which of them.
            same = len(refs) == group.size and f"{group.component}/{METADATA}" in small
            args = [(step, small, *([refs[rank]] if same else refs)) for rank in range(group.size)]
            calls += group.start_each("load_replica", args)
        report: LoadReport = wait_all(calls)[0]
        return report

    # -- self-check

    def self_check(self, responses: Sequence[Group]) -> list[list[UpdateCheck]]:
        """Let every rank compute with the same made-up responses, see `check_update`: results of each group."""
        return wait_all_lists(group.start("self_check", responses) for group in self.groups)

    def first_operations(self, responses: Sequence[Group]) -> list[str | None]:
        """Look for the first operation of `self_check` that does not repeat its bits: one name, or None, per group."""
        found = wait_all_lists(group.start("first_operation", responses) for group in self.groups)
        return [next(filter(None, of_group), None) for of_group in found]
