"""One training rank of the checkpoint benchmark: a sharded Llama with AdamW, its update, and every way to save it."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from _checkpoint_plain import Part, PeakMemory, read_plainly, write_plainly
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, PretrainedConfig

from rlinf_lite.checkpoint import Checkpointer, flatten
from rlinf_lite.config import FsdpConfig
from rlinf_lite.models import build, shard
from rlinf_lite.models import hf_directory as model_directory
from rlinf_lite.training.fsdp.state import build_optimizer, optimizer_state
from rlinf_lite.weights.hf import HfWeights
from rlinf_lite.weights.live import fill, local_rows
from rlinf_lite.weights.names import WeightNames, named_weights

SMOLLM2_135M: dict[str, Any] = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
}
TINY = {**SMOLLM2_135M, "hidden_size": 72, "num_hidden_layers": 4, "intermediate_size": 192, "vocab_size": 4096}
TOKENS = 64
FRACTIONS = (0.0, 0.1, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What every process of the benchmark is built from."""

    directory: Path
    world_size: int
    model_dir: Path | None
    quick: bool

    def model_config(self) -> PretrainedConfig:
        if self.model_dir is not None:
            return model_directory.load_config(model_directory.resolve(str(self.model_dir), key="--model"), None)
        return LlamaConfig(**(TINY if self.quick else SMOLLM2_135M), tie_word_embeddings=True)


class Rank:
    """The driver calls its methods on all ranks at once; each returns seconds or bytes of this rank alone."""

    def __init__(self, setup: Setup, rank: int) -> None:
        torch.manual_seed(rank)
        rendezvous = f"file://{setup.directory}/rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=setup.world_size)
        self.setup, self.rank = setup, rank
        self.model = build.build_on_meta(setup.model_config(), "fp32")
        mesh = dist.init_device_mesh("cpu", (setup.world_size,))
        shard.shard(self.model, shard.blocks(self.model), mesh, FsdpConfig())
        build.materialize(self.model, torch.device("cpu"))
        self._fill()
        self.optimizer = build_optimizer(
            list(self.model.parameters()), lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
        )
        self.optimizer.register_step_pre_hook(lambda *_: self._fence())
        self.ours = {
            fraction: Checkpointer(setup.directory / "ours", seed=0, staged_fraction=fraction) for fraction in FRACTIONS
        }
        self.background = dist.new_group(backend="gloo")  # dcp.async_save's, apart from the training's
        self.in_flight: Checkpointer | Future[Any] | None = None
        self.memory = PeakMemory()
        self._warm_up()

    def _fill(self) -> None:
        if self.setup.model_dir is not None:
            fill(self.model, HfWeights(self.setup.model_dir, WeightNames.of(self.model)))
            return
        with torch.no_grad():
            for name, param in self.model.named_parameters():
                local, _ = local_rows(param)
                local.fill_(1.0) if name.endswith("norm.weight") else local.normal_(std=0.02)

    def _warm_up(self) -> None:
        """Do imports and first calls before the measurement, on a state of a few bytes."""
        small, directory = {"model": {"x": torch.zeros(8)}}, self.setup.directory / "warm"
        Checkpointer(directory / "ours", seed=0).save(1, small)
        dcp.save(small, checkpoint_id=directory / "dcp")
        future = dcp.async_save(small, checkpoint_id=directory / "async", process_group=self.background)
        assert isinstance(future, Future)
        future.result()
        self.update()

    def state(self) -> dict[str, Any]:
        return {
            "model": dict(named_weights(self.model)),
            "optim": optimizer_state(dict(self.model.named_parameters()), self.optimizer),
        }

    def state_bytes(self) -> int:
        """Bytes of state that this rank holds."""
        local = [t.to_local() if isinstance(t, DTensor) else t for t in flatten(self.state()).values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in local)

    # -- the step loop

    def begin(self, method: str, step: int) -> float:
        """Start an asynchronous save (or none). Returns the seconds until the loop continues."""
        self.memory, self.blocked, self.durable_seconds = self._aligned_memory(), 0.0, 0.0
        self.started = time.perf_counter()
        if method == "dcp.async_save":
            directory = self.setup.directory / method / str(step)
            future = dcp.async_save(self.state(), checkpoint_id=directory, process_group=self.background)
            assert isinstance(future, Future)
            future.add_done_callback(lambda _: self._note_durable())
            self.in_flight = future
        elif method.startswith("ours async"):
            checkpointer = self.ours[float(method.split()[-1])]
            checkpointer.start(step, self.state())
            self.in_flight = checkpointer
        return time.perf_counter() - self.started

    def update(self) -> float:
        """One optimizer step on a small batch; the seconds that `fence` held it."""
        ids = torch.randint(self.model.config.vocab_size, (1, TOKENS))
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        return self.optimize()

    def fake_gradients(self) -> None:
        """For an `optimize` without a forward and backward pass before it."""
        for param in self.model.parameters():
            param.grad = torch.zeros_like(param)

    def optimize(self) -> float:
        """`optimizer.step()`; the seconds that `fence` held it."""
        self.fence_seconds = 0.0
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.fence_seconds

    def _fence(self) -> None:
        if isinstance(self.in_flight, Checkpointer):
            started = time.perf_counter()
            self.in_flight.fence()
            self.fence_seconds = time.perf_counter() - started

    def finish(self) -> float:
        """Wait for the save in flight; the seconds from `begin` until it was durable."""
        flying, self.in_flight = self.in_flight, None
        if isinstance(flying, Checkpointer):
            report = flying.finish()
            assert report is not None
            return report.durable_seconds
        if flying is not None:
            flying.result()
        return self.durable_seconds

    def _note_durable(self) -> None:
        self.durable_seconds = time.perf_counter() - self.started

    def peak_bytes(self) -> int:
        """Most resident bytes since `begin`, or since the last blocking save began, above what was held then."""
        return self.memory.above_start()

    def _aligned_memory(self) -> PeakMemory:
        memory = PeakMemory()
        dist.barrier()
        return memory

    # -- blocking saves and loads

    def save(self, method: str, step: int) -> float:
        """Seconds of a blocking save."""
        self.memory = self._aligned_memory()
        started, directory = time.perf_counter(), self.setup.directory / method / str(step)
        if method == "ours":
            self.ours[0.1].save(step, self.state())
        elif method == "dcp.save":
            dcp.save(self.state(), checkpoint_id=directory)
        elif method == "torch.save":
            directory.mkdir(parents=True, exist_ok=True)
            local = {n: t.to_local() if isinstance(t, DTensor) else t for n, t in flatten(self.state()).items()}
            torch.save(local, directory / f"{self.rank}.pt")
        else:
            raise ValueError(f"method={method}: not one of ours, dcp.save, torch.save")
        return time.perf_counter() - started

    def load(self, method: str, path: Path) -> float:
        """Seconds to load ``path`` (one of our checkpoints) in place: ``dcp.load``, or our verify ``off|size|full``."""
        dist.barrier()
        started = time.perf_counter()
        if method == "dcp.load":
            dcp.load(self.state(), checkpoint_id=path / "actor")
        else:
            self.ours[0.1].load(path, self.state(), verify=method)
        return time.perf_counter() - started

    # -- the machine's limit

    def write(self, directory: Path, num_bytes: int, direct: bool) -> float:
        dist.barrier()
        started = time.perf_counter()
        write_plainly(directory / f"{self.rank}.bin", num_bytes, direct=direct)
        return time.perf_counter() - started

    def read(self, parts: list[list[Part]]) -> float:
        dist.barrier()
        started = time.perf_counter()
        read_plainly(parts[self.rank])
        return time.perf_counter() - started
