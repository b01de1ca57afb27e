"""Two policy ranks and two engines of `fake_ray`, between which weights are published."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from fake_ray import FakeSession
from transformers import AutoModelForCausalLM, LlamaConfig

from rlinf_lite.cluster.group import WorkerGroup
from rlinf_lite.cluster.spares import Spares
from rlinf_lite.cluster.weight_sync import ObjectStoreSync
from rlinf_lite.cluster.workers.policy import PolicyWorkers
from rlinf_lite.cluster.workers.policy_worker import PolicyWorker
from rlinf_lite.cluster.workers.rollout import RolloutWorkers
from rlinf_lite.cluster.workers.rollout_worker import RolloutWorker
from rlinf_lite.rollout.builtin import BuiltinEngine
from rlinf_lite.weights.live import local_pieces
from rlinf_lite.weights.names import named_weights
from rlinf_lite.weights.pieces import WeightPiece

ARCHITECTURE = LlamaConfig(
    vocab_size=31,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)


class Case:
    """Two policy ranks, each with a part of the rows, and two engines in bf16; processes are those of `fake_ray`."""

    def __init__(self, transport: type = ObjectStoreSync, nodes: tuple[str, str] = ("a", "a")) -> None:
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(ARCHITECTURE, dtype=torch.float32)
        self.session = FakeSession(self.build, nodes=nodes)
        self.policy = self.group(PolicyWorkers, "Actors", "actor")
        self.rollouts = self.group(RolloutWorkers, "Engines", "rollout")
        self.sync = transport(self.policy, self.rollouts, "bf16")

    def group(self, kind: type, name: str, component: str) -> Any:
        group = object.__new__(kind)
        WorkerGroup.__init__(group, name, component, component, self.session, Spares(self.session))
        return group

    def build(self, target: str, rank: int, size: int) -> Any:
        return self.policy_worker(rank) if target == "actor" else self.rollout_worker(rank)

    def policy_worker(self, rank: int) -> PolicyWorker:
        worker = object.__new__(PolicyWorker)
        worker.rank, worker.step, worker._region, worker._bell = rank, 0, None, None
        worker._parts = SimpleNamespace(trainer=SimpleNamespace(weights=lambda dtype: self.rows(rank, dtype)))
        return worker

    def rows(self, rank: int, dtype: torch.dtype) -> list[WeightPiece]:
        pieces = []
        for name, _, rows in local_pieces(dict(named_weights(self.model)), dtype):
            middle = (len(rows) + 1) // 2
            pieces.append(WeightPiece(name, rank * middle, rows[middle:] if rank else rows[:middle]))
        return pieces

    def rollout_worker(self, rank: int) -> RolloutWorker:
        worker = object.__new__(RolloutWorker)
        worker.rank, worker.model, worker._summed = rank, copy.deepcopy(self.model).bfloat16(), None
        worker.config = SimpleNamespace(group_name="Engines", model=SimpleNamespace(precision="bf16"))
        worker.engine = BuiltinEngine(worker.model, None, eos_ids=frozenset({0}), return_logprobs=False, max_rows=4)
        return worker

    def worker(self, rank: int) -> RolloutWorker:
        worker: RolloutWorker = self.session.actors[2 + rank].worker
        return worker

    def has_weights(self, rank: int) -> bool:
        theirs = self.worker(rank).model.parameters()
        return all(torch.equal(a.bfloat16(), b) for a, b in zip(self.model.parameters(), theirs, strict=True))

    def train(self) -> None:
        with torch.no_grad():
            for param in self.model.parameters():
                param += torch.randn(param.shape)
