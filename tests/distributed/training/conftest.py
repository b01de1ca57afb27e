"""Ranks for the trainer's tests: gloo processes that meet through a store, and tiny models and batches for them."""

from __future__ import annotations

import itertools
import pickle
import runpy
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from rlinf_lite.config import Config
from rlinf_lite.types import Group, Problem, Prompt, Response

_PROGRAMS = 10
"""Then processes are replaced: each process group that something still refers to keeps a thread that never rests."""


class Ranks:
    """Processes that run one program after another; started when first needed, all replaced after a failure."""

    def __init__(self, context: ForkServerContext) -> None:
        self._context = context
        self._processes: list[ForkServerProcess] = []
        self._tasks: list[Iterator[int]] = []
        self._groups = itertools.count()

    def run(self, world_size: int, program: str, *, timeout: float = 400.0, **arguments: Any) -> list[Any]:
        """What ``rank_programs.program(mesh, **arguments)`` returns on each rank.

        Raises:
            The first error of a rank, or TimeoutError. The processes are then gone.
        """
        number = next(self._groups)
        if number % _PROGRAMS == 0:
            self.stop()
        self._start(world_size)
        group = f"group{number}"
        for rank in range(world_size):
            task = pickle.dumps((group, world_size, program, arguments))
            self._store.set(f"rank{rank}.task{next(self._tasks[rank])}", task)
        keys = [f"{group}.rank{rank}" for rank in range(world_size)]
        try:
            return self._collect(keys, time.monotonic() + timeout)
        except BaseException:
            self.stop()
            raise

    def _start(self, world_size: int) -> None:
        if not self._processes:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        while len(self._processes) < world_size:
            rank = len(self._processes)
            program = str(Path(__file__).parent / "rank_process.py")
            arguments = (program, {"PORT": self._store.port, "RANK": rank}, "rank")
            self._processes.append(self._context.Process(target=runpy.run_path, args=arguments))
            self._processes[rank].start()
            self._tasks.append(itertools.count())

    def _collect(self, keys: list[str], deadline: float) -> list[Any]:
        while True:
            answers = self._answers(keys)
            if any(error is not None for _, error, _ in answers):
                self._raise_first(keys)
            if len(answers) == len(keys):
                return [result for result, *_ in answers]
            self._raise_if_one_has_ended(keys)
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer from ranks {self._missing(keys)}")
            time.sleep(0.01)

    def _raise_first(self, keys: list[str]) -> None:
        """Raise the error that came first: later ones may be of ranks that lost the one that failed."""
        until = time.monotonic() + 1.0
        while self._missing(keys) and time.monotonic() < until:
            time.sleep(0.01)
        failed = [(seconds, error) for _, error, seconds in self._answers(keys) if error is not None]
        first = min(failed, key=itemgetter(0))[1]
        self._raise_if_one_has_ended(keys, cause=first)
        raise first

    def _raise_if_one_has_ended(self, keys: list[str], cause: BaseException | None = None) -> None:
        for rank in self._missing(keys):
            if self._processes[rank].exitcode is not None:
                raise RuntimeError(f"rank {rank} ended with status {self._processes[rank].exitcode}") from cause

    def _answers(self, keys: list[str]) -> list[tuple[Any, BaseException | None, float]]:
        return [pickle.loads(self._store.get(key)) for key in keys if self._store.check([key])]

    def _missing(self, keys: list[str]) -> list[int]:
        return [rank for rank, key in enumerate(keys) if not self._store.check([key])]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes, self._tasks = [], []


@pytest.fixture(scope="session")
def ranks(fork_server):
    processes = Ranks(fork_server)
    yield processes
    processes.stop()


@pytest.fixture
def fresh_ranks(fork_server):
    """Processes of this test alone; after ``stop()`` the next program gets new ones."""
    processes = Ranks(fork_server)
    yield processes
    processes.stop()


LLAMA = {
    "vocab_size": 37,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "max_position_embeddings": 32,
    "initializer_range": 0.15,
    "tie_word_embeddings": True,
}
"""Sizes that 2 and 3 ranks cannot split evenly."""
NO_ENDS = {"bos_token_id": None, "eos_token_id": None}  # the defaults lie outside this vocabulary
GPT2 = {
    "vocab_size": 37,
    "n_embd": 20,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "initializer_range": 0.15,
    **NO_ENDS,
}


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory) -> dict[str, str]:
    """``llama`` (tied), ``gpt2`` (tied, dropout) and ``untied``: base models as Hugging Face directories."""
    dropout = {"resid_pdrop": 0.2, "embd_pdrop": 0.1, "attn_pdrop": 0.0}
    configs = {
        "llama": AutoConfig.for_model("llama", **LLAMA),
        "gpt2": AutoConfig.for_model("gpt2", **GPT2, **dropout),
        "untied": AutoConfig.for_model("llama", **{**LLAMA, "tie_word_embeddings": False}),
    }
    directories = {}
    for name, config in configs.items():
        torch.manual_seed(3)
        directories[name] = str(tmp_path_factory.mktemp("models") / name)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directories[name])
    return directories


@pytest.fixture
def make_config():
    """``make_config({"algorithm.kl_beta": 0.1})``. With a large Adam eps: rounding near 0 stays small."""

    def make(changes: dict[str, Any] | None = None) -> Config:
        config = Config()
        plain = {
            "algorithm.training_batch_size_per_gpu": 2,
            "algorithm.logprob_forward_micro_batch_size": 2,
            "actor.optim.lr": 0.01,
            "actor.optim.adam_eps": 1e-3,
            "actor.optim.weight_decay": 0.1,
            "actor.optim.clip_grad": 0.0,
        }
        for key, value in {**plain, **(changes or {})}.items():
            *path, last = key.split(".")
            node: Any = config
            for name in path:
                node = getattr(node, name)
            assert last in vars(node), key
            setattr(node, last, value)
        return config

    return make


@pytest.fixture
def assert_same_state():
    """Parameters, optimizer state, counters: equal, not close."""

    def check(one: dict[str, Any], other: dict[str, Any]) -> None:
        assert one["model"].keys() == other["model"].keys()
        for name, tensor in one["model"].items():
            assert torch.equal(tensor, other["model"][name]), name
            for key, value in one["optim"][name].items():
                assert torch.equal(value, other["optim"][name][key]), (name, key)
        assert (one["num_updates"], one["grad_scaler"]) == (other["num_updates"], other["grad_scaler"])

    return check


@pytest.fixture
def groups() -> list[Group]:
    """Ten responses of very different lengths to five prompts, so that ranks hold different numbers of tokens."""
    rng = np.random.default_rng(0)
    lengths = [(3, (12, 1)), (5, (9, 2)), (1, (14, 1)), (6, (3, 3)), (2, (11, 2))]

    def response(sample: int, num_tokens: int) -> Response:
        return Response(
            sample_index=sample,
            token_ids=rng.integers(0, 37, num_tokens),
            loss_mask=np.ones(num_tokens, dtype=bool),
            logprobs=rng.normal(-3.6, 0.1, num_tokens).astype(np.float32),
            finished=True,
            text="",
            weights_step=0,
        )

    made = []
    for index, (prompt, responses) in enumerate(lengths):
        ids = tuple(rng.integers(0, 37, prompt).tolist())
        problem = Problem(problem_id=index, prompt="?", answer="", prompt_ids=ids, source="")
        made.append(
            Group(
                prompt=Prompt(prompt_index=index, epoch=0, problem=problem),
                responses=tuple(response(sample, num_tokens) for sample, num_tokens in enumerate(responses)),
            )
        )
    return made


@pytest.fixture
def advantages() -> torch.Tensor:
    return torch.tensor([1.2, -0.7, 0.4, -1.5, 0.9, 2.0, -0.3, 0.0, -1.1, 0.6])
