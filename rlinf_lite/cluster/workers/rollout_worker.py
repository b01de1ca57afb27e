"""The remote side of `RolloutWorkers`: one engine. Imports neither training nor checkpoint, so it starts sooner."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from rlinf_lite import faults
from rlinf_lite.cluster.workers.device import compute_capability, fix_device
from rlinf_lite.cluster.workers.records import EngineSetup, GeneratedAhead, StoreAddress
from rlinf_lite.cluster.workers.rendezvous import join_store
from rlinf_lite.cluster.workers.wire import Groups
from rlinf_lite.config import ClusterConfig, RolloutConfig, SamplingConfig, TokenizerConfig
from rlinf_lite.models import build, hf_directory, vocabulary
from rlinf_lite.node.bell import BellAddress, Listener
from rlinf_lite.rollout.build import build_engine
from rlinf_lite.rollout.engine import RolloutEngine
from rlinf_lite.selfcheck.engine import check_engine
from rlinf_lite.selfcheck.made_up import SMALL, batch_of, made_up_groups
from rlinf_lite.selfcheck.records import EngineCheck
from rlinf_lite.types import GenerationBatch, Group, Sampling
from rlinf_lite.weights.checksum import Checksums, checksums, require_equal
from rlinf_lite.weights.names import named_weights, weight_shapes
from rlinf_lite.weights.pieces import NamedTensor, WeightPiece
from rlinf_lite.weights.region import Layout, Region, RegionAddress, layout_of
from rlinf_lite.weights.shared import SharedWeights, export
from rlinf_lite.weights.source import as_dtype
from rlinf_lite.weights.transport import Broadcaster, PackedWeights, unpack


class RolloutWorker:
    """One rollout engine."""

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        config: RolloutConfig,
        tokenizer: TokenizerConfig,
        cluster: ClusterConfig,
        device: str,
    ) -> None:
        self.rank, self.config = rank, config
        self._tokenizer = tokenizer.tokenizer_model
        self.device = fix_device(cluster, device)
        self._channel: Broadcaster | None = None
        self._summed: Checksums | None = None

    def setup(self, sampling: SamplingConfig, seq_length: int) -> EngineSetup:
        """Build the engine; its weights are empty until they are published for the first time."""
        settings = self.config.model
        model_dir = hf_directory.resolve(settings.model_path, "rollout.model.model_path")
        # Takes no memory; gives the order, shapes and types of the weights.
        self.model = build.build_on_meta(hf_directory.load_config(model_dir, settings.model_type), settings.precision)
        shapes = weight_shapes(self.model)
        tokenizer = hf_directory.load_tokenizer(
            hf_directory.resolve(self._tokenizer, "actor.tokenizer.tokenizer_model")
        )
        self._build = functools.partial(
            build_engine,
            model=self.model,
            tokenizer=tokenizer,
            seq_length=seq_length,
            sampling=sampling,
            model_dir=model_dir,
            shapes=shapes,
            device=self.device,
        )
        eos_ids = vocabulary.eos_ids(model_dir, tokenizer)
        self.engine: RolloutEngine = self._build(self.config, eos_ids=eos_ids, materialize=build.materialize)
        self._checked_with = Sampling(**vars(sampling)), seq_length
        comparable = self.engine.held_weights() is not None
        return EngineSetup(compute=compute_capability(self.device), weights=shapes, comparable=comparable)

    def load_weights(self, *packed: PackedWeights) -> None:
        """Load weights from the rows of every policy rank."""
        self._summed = None
        self.engine.load_weights(piece for of_rank in packed for piece in unpack(of_rank))

    def weight_layout(self) -> Layout:
        """Return where in a region of shared memory the engine's weights would lie."""
        return layout_of(self._held())

    def open_region(self, address: RegionAddress, num_writers: int) -> list[BellAddress] | str:
        """Keep the engine's weights in shared memory from now on.

        What they were is lost. What this process itself writes to them later stays its own.

        Returns:
            What each writer opens to tell the engine that it has written; or why all this is not possible.
        """
        try:
            region, self._listener = Region.open(address, is_private=True), Listener(num_writers)
        except OSError as error:
            return f"rank {self.rank}: {error}"
        region.become(self._held())
        return self._listener.addresses

    def share_weights(self) -> SharedWeights:
        """Say how the memory of the engine's weights is opened."""
        return export(self._held())

    def _held(self) -> Iterator[NamedTensor]:
        held = self.engine.held_weights()
        assert held is not None, "the driver asks a builtin engine only"
        return held

    def sum_weights(self, step: int, *written: object) -> None:
        """Compute the checksums of the engine's weights for the next `check_weights` or `generate_ahead`.

        Args:
            step: completed steps of the weights.
            written: not used; of calls that must be over.
        """
        if faults.is_planned("rollout.weights", "flip", step=step, rank=self.rank):
            next(self.model.parameters()).data.view(-1)[:1].neg_()
        dtype = build.DTYPES[self.config.model.precision]
        self._summed = checksums(WeightPiece(name, 0, as_dtype(tensor, dtype)) for name, tensor in self._held())

    def check_weights(self, step: int, *sent: Checksums) -> None:
        """Compare the engine's weights with what every policy rank sent, if the engine can say which it holds.

        Args:
            step: completed steps of the weights.

        Raises:
            WeightsDiffer: they differ.
        """
        if (held := self._checksums(step)) is not None:
            require_equal(f"{self.config.group_name} rank {self.rank}", step, sent, held)

    def _checksums(self, step: int) -> Checksums | None:
        """Those of `sum_weights`, once; None if the engine cannot say which weights it holds."""
        if self.engine.held_weights() is None:
            return None
        if self._summed is None:
            self.sum_weights(step)
        found, self._summed = self._summed, None
        return found

    def join_channel(self, address: StoreAddress, num_receivers: int) -> None:
        """Join the group over which policy rank 0 broadcasts weights."""
        self._channel = Broadcaster(join_store(address), rank=1 + self.rank, size=1 + num_receivers, device=self.device)

    def receive(self) -> None:
        """Receive what `PolicyWorker.broadcast` sends: the same weights in the same order."""
        channel = self._channel
        assert channel is not None, "called before join_channel"
        self.engine.load_weights(
            WeightPiece(name, 0, channel.broadcast(torch.empty_like(target, device=self.device)))
            for name, target in named_weights(self.model)
        )

    def generate(self, batch: GenerationBatch) -> list[Group]:
        """Sample the responses of one generation batch."""
        faults.reach(f"rollout.{batch.stream}", step=batch.step, rank=self.rank)
        return Groups(self.engine.generate(batch))

    def generate_ahead(self, batch: GenerationBatch, step: int, is_told: bool, *arrived: None) -> GeneratedAhead:
        """Sample the responses of one generation batch, before anything compared the engine's weights.

        Args:
            step: completed steps of the weights.
            is_told: by those who write the weights, when they have: it waits for that.
            arrived: nothing; of calls that must have succeeded.

        Raises:
            BrokenPipeError: one of them has ended or failed. Its own call fails then, too, and the driver raises that.
        """
        if is_told:
            self._listener.wait(step)
        weights = self._checksums(step)
        return GeneratedAhead(rank=self.rank, groups=self.generate(batch), weights=weights)

    def self_check(self) -> EngineCheck:
        """Check the builtin engine, as `check_engine`; with vLLM only make up responses for the trainers' check."""
        vocab_size = self.model.config.get_text_config().vocab_size
        batch = batch_of(SMALL[self.device.type], vocab_size, *self._checked_with)
        if self.config.rollout_backend != "builtin":
            return EngineCheck(groups=made_up_groups(batch, vocab_size), is_checked=False)
        # Another engine over the same model, which returns log-probs, and generates as many tokens as it may.
        config = self.config.model_copy(update={"return_logprobs": True})
        return check_engine(self._build(config, eos_ids=frozenset(), materialize=lambda *_: None), batch)

    def sleep(self) -> None:
        """Free memory: nothing more is generated before the next weights come."""
        self.engine.sleep()
