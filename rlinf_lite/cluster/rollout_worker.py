"""The remote rollout worker: a shell around one engine. Imports neither training nor checkpoint, to be up sooner."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from rlinf_lite import faults
from rlinf_lite.cluster.process import compute_capability, prepare
from rlinf_lite.cluster.weight_channel import Broadcaster, Pieces, unpack
from rlinf_lite.config import Config
from rlinf_lite.models import build, folder
from rlinf_lite.rollout.builtin import BuiltinEngine
from rlinf_lite.rollout.engine import RolloutEngine
from rlinf_lite.types import GenerationChunk, Rollout


class RolloutWorker:
    """One rollout engine."""

    def __init__(self, rank: int, world_size: int, config: Config, device: str) -> None:
        self.rank, self.config = rank, config
        self.device = prepare(config, device)
        self.channel: Broadcaster | None = None

    def setup(self) -> dict[str, Any]:
        """Build the engine, its weights empty until the first publish. Returns facts to hold against the actor's."""
        self.model = self._build_model()
        model_dir = folder.resolve(self.config.actor.tokenizer.tokenizer_model, "actor.tokenizer.tokenizer_model")
        tokenizer = folder.load_tokenizer(model_dir)
        self.engine: RolloutEngine = BuiltinEngine(
            self.model,
            tokenizer,
            eos_ids=folder.eos_ids(folder.resolve(self.config.rollout.model.model_path), tokenizer),
            return_logprobs=self.config.rollout.return_logprobs,
        )
        return {"compute": compute_capability(self.device), "weights": build.weight_shapes(self.model)}

    def _build_model(self) -> PreTrainedModel:
        settings = self.config.rollout.model
        model_dir = folder.resolve(settings.model_path, "rollout.model.model_path")
        model = build.build_on_meta(folder.load_config(model_dir, settings.model_type), settings.precision)
        build.materialize(model, self.device)
        return model

    def load_weights(self, *pieces: Pieces) -> None:
        """From every actor rank's rows."""
        self.engine.load_weights(piece for packed in pieces for piece in unpack(packed))

    def join_channel(self, address: tuple[str, int], num_receivers: int) -> None:
        store = dist.TCPStore(*address, is_master=False)
        self.channel = Broadcaster(store, rank=1 + self.rank, size=1 + num_receivers, device=self.device)

    def receive(self) -> None:
        """The other end of `ActorWorker.broadcast`: the same weights in the same order."""
        assert self.channel is not None
        for name, target in build.named_state(self.model):
            self.engine.load_weights([(name, 0, self.channel.broadcast(torch.empty_like(target)))])

    def generate(self, chunk: GenerationChunk) -> list[Rollout]:
        faults.reach(f"rollout.{chunk.stream}", step=chunk.step, rank=self.rank)
        return self.engine.generate(chunk)
