"""The rollout workers as the driver calls them: weights in, responses out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from rlinf_lite.cluster.group import Call, WorkerGroup
from rlinf_lite.cluster.session import Session
from rlinf_lite.cluster.spares import Spares
from rlinf_lite.cluster.work_queue import WorkQueue
from rlinf_lite.cluster.workers.records import EngineSetup, Generated, StoreAddress
from rlinf_lite.config import RolloutConfig, SamplingConfig, TokenizerConfig
from rlinf_lite.selfcheck.records import EngineCheck
from rlinf_lite.types import GenerationBatch

if TYPE_CHECKING:  # imports torch, which the driver does later
    from rlinf_lite.node.bell import BellAddress
    from rlinf_lite.weights.checksum import Checksums
    from rlinf_lite.weights.region import Layout, RegionAddress
    from rlinf_lite.weights.shared import SharedWeights
    from rlinf_lite.weights.transport import PackedWeights

Key = TypeVar("Key")


class RolloutWorkers(WorkerGroup):
    """All rollout engines."""

    def __init__(
        self,
        config: RolloutConfig,
        tokenizer: TokenizerConfig,
        session: Session,
        spares: Spares,
        *,
        sampling: SamplingConfig,
        seq_length: int,
    ) -> None:
        """Start every process; does not wait until they are up.

        Args:
            sampling: of training.
            seq_length: largest number of tokens in a prompt and its response together.
        """
        self.precision = config.model.precision
        self.can_share_weights = config.rollout_backend == "builtin"
        self._sampling, self._seq_length = sampling, seq_length
        target = "rlinf_lite.cluster.workers.rollout_worker:RolloutWorker"
        arguments = config, tokenizer, session.config, session.device
        super().__init__(config.group_name, "rollout", target, session, spares, *arguments)

    def start_setup(self, rank: int) -> Call[EngineSetup]:
        """Build one engine, without weights."""
        return self.start_one(rank, "setup", self._sampling, self._seq_length)

    def start_generate(self, rank: int, batch: GenerationBatch) -> Call[Generated]:
        """Sample the responses of one generation batch on one engine."""
        return self.start_one(rank, "generate", batch)

    def start_generate_ahead(
        self, rank: int, batch: GenerationBatch, step: int, arrived: Sequence[Call[None]] | None
    ) -> Call[Generated]:
        """As `start_generate`, with weights that nothing has compared yet.

        Args:
            step: completed steps of the weights.
            arrived: calls that must succeed before: otherwise nothing is sampled, and the call fails. None: the
                policy's ranks tell the engine themselves.
        """
        refs = [call.ref for call in arrived or []]
        return self.start_one(rank, "generate_ahead", batch, step, arrived is None, *refs)

    def queue(self) -> WorkQueue[Key, GenerationBatch, Generated]:
        """A queue of generation batches, each for whichever engine is free."""
        return WorkQueue(self, self.start_generate)

    def self_check(self) -> list[EngineCheck]:
        """Let every engine generate the same made-up batch; waits, and raises as `wait_all`."""
        return self.call("self_check")

    def sleep(self) -> None:
        """Let every engine free its memory until the next weights come."""
        self.call("sleep")

    # -- weights

    def start_load_weights(self, rows: Sequence[Call[PackedWeights]]) -> list[Call[None]]:
        """Load what `PolicyWorkers.start_weight_rows` puts into the object store into every engine."""
        return self.start("load_weights", *(call.ref for call in rows))

    def start_load_weights_on(self, rank: int, rows: Sequence[Call[PackedWeights]]) -> Call[None]:
        """As `start_load_weights`, into one engine."""
        return self.start_one(rank, "load_weights", *(call.ref for call in rows))

    def start_weight_layout_on(self, rank: int) -> Call[Layout]:
        """Ask one engine how large a region of shared memory its weights need, and where each lies in it."""
        return self.start_one(rank, "weight_layout")

    def start_open_region_on(
        self, rank: int, address: RegionAddress, num_writers: int
    ) -> Call[list[BellAddress] | str]:
        """Let one engine keep its weights in shared memory: how its writers tell it of them, or why it cannot."""
        return self.start_one(rank, "open_region", address, num_writers)

    def start_sum_weights_on(self, rank: int, step: int, written: Sequence[Call[Any]]) -> Call[None]:
        """Let one engine compute its checksums for `start_check_weights_on` when ``written`` is done."""
        return self.start_one(rank, "sum_weights", step, *(call.ref for call in written))

    def start_share_weights(self) -> list[Call[SharedWeights]]:
        """Let every engine say how its weights' memory is opened. They must not change place any more."""
        return self.start("share_weights")

    def start_check_weights(self, step: int, sent: Sequence[Call[Checksums]]) -> list[Call[None]]:
        """Let every engine compare its weights with what the policy sent.

        Args:
            step: completed steps of the weights.

        Raises:
            WeightsDiffer: an engine holds others.
        """
        return [self.start_check_weights_on(rank, step, sent) for rank in range(self.size)]

    def start_check_weights_on(self, rank: int, step: int, sent: Sequence[Call[Checksums]]) -> Call[None]:
        """As `start_check_weights`, one engine."""
        return self.start_one(rank, "check_weights", step, *(call.ref for call in sent))

    def start_joining_channel(self, address: StoreAddress) -> list[Call[None]]:
        """Let every engine join the group over which policy rank 0 broadcasts weights."""
        return self.start("join_channel", address, self.size)

    def start_receiving(self) -> list[Call[None]]:
        """Let every engine receive one broadcast of all weights."""
        return self.start("receive")
