"""Updates of a model of well-known shape, ours and one in plain torch, for rows 3, 4, 10 and 12: each in processes of
its own, which are called by turns. Made-up responses; every rank and process makes the same ones.
"""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional
from transformers import AutoModelForCausalLM

from rlinf_lite import numerics
from rlinf_lite.algorithms import build_algorithm
from rlinf_lite.config import ActorConfig, AlgorithmConfig, FsdpConfig, OptimConfig
from rlinf_lite.config.actor import PolicyModelConfig
from rlinf_lite.models.products import product
from rlinf_lite.training.batch import SplitSettings, StepBatch, StepRows
from rlinf_lite.training.fsdp.build import build_policy
from rlinf_lite.training.fsdp.trainer import FsdpTrainer
from rlinf_lite.training.ranks import shard_mini_batch
from rlinf_lite.types import Column, Group, MiniBatch, Problem, Prompt, Response

LR = 1e-6


class Processes:
    """Objects of one class, one per process; a method is called on all of them at once, with results by rank."""

    def __init__(self, target: type, *args: Any, number: int = 1, threads: int = 1, plainly: bool = False) -> None:
        """Make ``target(rank, number, port, *args)`` in each.

        Args:
            plainly: with the environment that a script without this project has, but for the number of threads.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        from _paired import number_of_threads  # not at the top: a test runs this file by its path

        context = get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        with _environment(number_of_threads(threads) if plainly else numerics.environment(threads)):
            for rank in range(number):
                mine, theirs = context.Pipe()
                args_of_rank = theirs, threads, target, (rank, number, port, *args)
                self._processes.append(context.Process(target=_serve, args=args_of_rank, daemon=True))
                self._processes[-1].start()
                theirs.close()
                self._pipes.append(mine)
        self._results()

    def call(self, method: str, *args: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((method, args))
        return self._results()

    def _results(self) -> list[Any]:
        found = []
        for pipe in self._pipes:
            result, error = pipe.recv()
            if error:
                raise SystemExit(error)
            found.append(result)
        return found

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join()


@contextmanager
def _environment(variables: dict[str, str]) -> Any:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(pipe: Connection, threads: int, target: type, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    try:
        served = target(*args)
        pipe.send((None, None))
        while True:
            method, given = pipe.recv()
            pipe.send((getattr(served, method)(*given), None))
    except EOFError:
        return
    except Exception:
        pipe.send((None, traceback.format_exc()))


def responses(
    prompt_lengths: Sequence[int], group_size: int, lengths: Sequence[int], vocab_size: int, *, seed: int = 1
) -> list[Group]:
    """Groups of random tokens.

    Args:
        lengths: of each response, group by group.
    """
    draw, groups = np.random.default_rng(seed), []
    for index, length in enumerate(prompt_lengths):
        ids = tuple(draw.integers(4, vocab_size, length).tolist())
        problem = Problem(problem_id=index, prompt="", answer="", prompt_ids=ids, source="made up")
        of_group = lengths[index * group_size : (index + 1) * group_size]
        made = tuple(_response(i, draw.integers(4, vocab_size, length)) for i, length in enumerate(of_group))
        groups.append(Group(prompt=Prompt(prompt_index=index, epoch=0, problem=problem), responses=made))
    return groups


def _response(sample_index: int, ids: np.ndarray) -> Response:
    mask = np.ones(len(ids), dtype=np.bool_)
    given: dict[str, Any] = {"logprobs": None, "finished": True, "text": "", "weights_step": 0}
    return Response(sample_index=sample_index, token_ids=ids, loss_mask=mask, **given)


def mini_batch(groups: Sequence[Group], rows_per_unit: int) -> MiniBatch:
    """All responses as one mini-batch, with advantages of both signs."""
    num = sum(len(group.responses) for group in groups)
    settings = SplitSettings(
        num_minibatches=1, shuffle_seed=None, rows_for_forward=rows_per_unit, rows_for_update=rows_per_unit,
        max_tokens=None,
    )  # fmt: skip
    batch = StepBatch(StepRows(groups, step=1, settings=settings), [True] * num)
    signs = 1.0 - 2.0 * (torch.arange(num) % 2)
    columns = {Column.ADVANTAGE: signs.repeat_interleave(torch.from_numpy(batch.num_tokens_N))}
    return batch.for_update(columns, np.ones(num, dtype=np.bool_))[0]


def policy(model_dir: Path, mesh: DeviceMesh) -> FsdpTrainer:
    """The policy as a run builds it, in fp32 on a CPU."""
    actor = ActorConfig(
        model=PolicyModelConfig(model_path=str(model_dir), precision="fp32"), optim=OptimConfig(lr=LR, clip_grad=1.0)
    )
    return build_policy(actor, AlgorithmConfig(), model_dir=model_dir, mesh=mesh, device=torch.device("cpu"))


LOSS = build_algorithm(AlgorithmConfig()).losses().policy
VIRTUAL_RANKS = FsdpConfig().virtual_ranks


class Ours:
    """One rank of this project's policy."""

    def __init__(self, rank: int, number: int, port: int, model_dir: Path, vocab_size: int, threads: int) -> None:
        numerics.fix("cpu", threads=threads)
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=number)
        self.rank, self.number, self._vocab_size, self._before = rank, number, vocab_size, _resident("VmRSS")
        self.trainer = policy(model_dir, init_device_mesh("cpu", (number,)))

    def _batch(self, groups: dict[str, Any], rows_per_unit: int) -> MiniBatch:
        return mini_batch(responses(**groups, vocab_size=self._vocab_size), rows_per_unit)

    def step(self, groups: dict[str, Any], rows_per_unit: int) -> float:
        """Seconds of an update; groups are the arguments of `responses`."""
        whole = self._batch(groups, rows_per_unit)
        batch = shard_mini_batch(whole, self.number, virtual_ranks=VIRTUAL_RANKS)[self.rank]
        dist.barrier()
        began = time.perf_counter()
        self.trainer.forward_backward(batch, LOSS)
        self.trainer.optim_step(LR)
        dist.barrier()
        return time.perf_counter() - began

    def gradient(self, groups: dict[str, Any], rows_per_unit: int) -> tuple[Tensor, list[Tensor]]:
        """Log-probs of all responses in order, and the gradient of each parameter; on one rank."""
        batch = self._batch(groups, rows_per_unit)
        found = self.trainer.forward(batch.units)
        logprobs = torch.cat([found[unit.index] for unit in batch.units])
        (of_rank,) = shard_mini_batch(batch, 1, virtual_ranks=VIRTUAL_RANKS)
        self.trainer.forward_backward(of_rank, LOSS)
        gradients = [gradient.clone() for _, gradient in self.trainer.gradients()]
        self.trainer.drop_gradients()
        return logprobs, gradients

    def compare(self, groups: dict[str, Any], one: int, other: int) -> tuple[bool, float]:
        """Whether the log-probs of units of so many rows are equal bit for bit, and how far the gradients differ.

        Returns:
            The latter as the norm of the difference, by the norm.
        """
        (logprobs, mine), (others, theirs) = (self.gradient(groups, rows) for rows in (one, other))
        difference = sum((a.double() - b.double()).square().sum().item() for a, b in zip(mine, theirs, strict=True))
        norm = sum(b.double().square().sum().item() for b in theirs)
        return torch.equal(logprobs, others), (difference / norm) ** 0.5

    def peak_memory(self, groups: dict[str, Any], rows_per_unit: int) -> int:
        """Bytes that this process has beyond what it had before the model was built, at most, in the second update."""
        self.step(groups, rows_per_unit)
        Path("/proc/self/clear_refs").write_text("5")
        self.step(groups, rows_per_unit)
        return _resident("VmHWM") - self._before


def _resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


class Plain:
    """The same update as a script of plain torch makes it: transformers' model with its own attention, and AdamW."""

    def __init__(self, rank: int, number: int, port: int, model_dir: Path, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, betas=(0.9, 0.999), fused=True)

    def step(self, groups: dict[str, Any]) -> float:
        """Seconds of an update with all responses in one batch; they must have one length, as must the prompts."""
        made = responses(**groups, vocab_size=self._vocab_size)
        rows = [[*group.prompt.problem.prompt_ids, *r.token_ids] for group in made for r in group.responses]
        ids, prompt = torch.tensor(np.array(rows)), len(made[0].prompt.problem.prompt_ids)
        advantages = (1.0 - 2.0 * (torch.arange(len(rows)) % 2))[:, None]
        began = time.perf_counter()
        logits = self.model(ids, use_cache=False, logits_to_keep=ids.shape[1] - prompt + 1).logits[:, :-1]
        targets = ids[:, prompt:]
        logprobs = -functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        logprobs = logprobs.view_as(targets)
        loss = -(advantages * (logprobs - logprobs.detach()).exp()).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began

    def peak(self) -> float:
        """Floating-point operations per second of a large matrix product, by MKL or oneDNN, whichever is faster."""
        a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
        seconds = []
        for multiply in (functional.linear, product) * 5:
            began = time.perf_counter()
            multiply(a, b, None)
            seconds.append(time.perf_counter() - began)
        return 2 * 2048**3 / min(seconds)
