"""The remote rollout worker: a shell around one engine. Imports neither training nor checkpoint, to be up sooner."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from rlinf_lite import faults
from rlinf_lite.cluster.process import compute_capability, prepare
from rlinf_lite.config import Config
from rlinf_lite.models import build, hf_directory, vocabulary
from rlinf_lite.rollout.build import build_engine
from rlinf_lite.rollout.engine import RolloutEngine
from rlinf_lite.types import GenerationBatch, Rollout
from rlinf_lite.weights.names import named_weights, weight_shapes
from rlinf_lite.weights.pieces import WeightPiece
from rlinf_lite.weights.transport import Broadcaster, PackedWeights, unpack


class RolloutWorker:
    """One rollout engine."""

    def __init__(self, rank: int, world_size: int, config: Config, device: str) -> None:
        self.rank, self.config = rank, config
        self.device = prepare(config, device)
        self.channel: Broadcaster | None = None

    def setup(self) -> dict[str, Any]:
        """Build the engine, its weights empty until the first publish. Returns facts to hold against the actor's."""
        settings = self.config.rollout.model
        model_dir = hf_directory.resolve(settings.model_path, "rollout.model.model_path")
        # From this alone the order, shapes and types of the weights are known; it takes no memory.
        self.model = build.build_on_meta(hf_directory.load_config(model_dir, settings.model_type), settings.precision)
        shapes = weight_shapes(self.model)
        tokenizer = hf_directory.load_tokenizer(
            hf_directory.resolve(self.config.actor.tokenizer.tokenizer_model, "actor.tokenizer.tokenizer_model")
        )
        self.engine: RolloutEngine = build_engine(
            self.config,
            self.model,
            tokenizer,
            model_dir=model_dir,
            shapes=shapes,
            eos_ids=vocabulary.eos_ids(model_dir, tokenizer),
            device=self.device,
            materialize=build.materialize,
        )
        return {"compute": compute_capability(self.device), "weights": shapes}

    def load_weights(self, *packed: PackedWeights) -> None:
        """From every actor rank's rows."""
        self.engine.load_weights(piece for of_rank in packed for piece in unpack(of_rank))

    def join_channel(self, address: tuple[str, int], num_receivers: int) -> None:
        store = dist.TCPStore(*address, is_master=False)
        self.channel = Broadcaster(store, rank=1 + self.rank, size=1 + num_receivers, device=self.device)

    def receive(self) -> None:
        """The other end of `ActorWorker.broadcast`: the same weights in the same order."""
        channel = self.channel
        assert channel is not None
        self.engine.load_weights(
            WeightPiece(name, 0, channel.broadcast(torch.empty_like(target, device=self.device)))
            for name, target in named_weights(self.model)
        )

    def generate(self, batch: GenerationBatch) -> list[Rollout]:
        faults.reach(f"rollout.{batch.stream}", step=batch.step, rank=self.rank)
        return self.engine.generate(batch)

    def sleep(self) -> None:
        """Nothing more is generated before the next weights come."""
        self.engine.sleep()
