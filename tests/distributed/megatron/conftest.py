"""Ranks with megatron-core, which takes seconds to import: one process imports it, and is forked for each rank."""

from __future__ import annotations

import itertools
import os
import pickle
import runpy
import signal
import time
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from rlinf_lite.config import Config
from rlinf_lite.training.batch import SplitSettings, StepBatch, StepRows
from rlinf_lite.types import Column, Group, Problem, Prompt, Response

NUM_RANKS = 4


class Ranks:
    """Processes that run one program after another; started when first needed, all replaced after a failure."""

    def __init__(self, context) -> None:
        self._context, self._process = context, None
        self._numbers = itertools.count()

    def run(self, world_size: int, program: str, *, timeout: float = 120.0, **arguments: Any) -> list[Any]:
        """What ``rank_programs.program(**arguments)`` returns on each rank.

        Raises:
            The first error of a rank, or TimeoutError. The processes are then gone.
        """
        if self._process is None:
            self._start()
        number = next(self._numbers)
        self._store.set(f"task{number}", pickle.dumps((world_size, program, arguments)))
        deadline, keys = time.monotonic() + timeout, [f"task{number}.rank{rank}" for rank in range(world_size)]
        try:
            while not self._store.check(keys):
                self._raise_first([key for key in keys if self._store.check([key])])
                if time.monotonic() > deadline or self._process.exitcode is not None:
                    raise TimeoutError(f"no answer from {[key for key in keys if not self._store.check([key])]}")
                time.sleep(0.01)
            return self._raise_first(keys)
        except BaseException:
            self.stop()
            raise

    def _raise_first(self, keys):
        answers = [pickle.loads(self._store.get(key)) for key in keys]
        failed = [(seconds, error) for _, error, seconds in answers if error is not None]
        if failed:
            raise min(failed, key=itemgetter(0))[1]  # later ones are errors of ranks that lost this one
        return [result for result, *_ in answers]

    def _start(self) -> None:
        self._numbers = itertools.count()
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        program = str(Path(__file__).parent / "rank_process.py")
        task = {"PORT": self._store.port, "NUM_RANKS": NUM_RANKS}
        self._process = self._context.Process(target=runpy.run_path, args=(program, task, "ranks"))
        self._process.start()

    def stop(self) -> None:
        if self._process is not None:
            with_its_forks = self._process.pid
            try:
                os.killpg(with_its_forks, signal.SIGKILL)
            except ProcessLookupError:  # it has not made a group of its own yet, so it has no forks
                self._process.kill()
            self._process.join()
        self._process = None


@pytest.fixture(scope="session")
def ranks(fork_server):
    processes = Ranks(fork_server)
    yield processes
    processes.stop()


SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 8}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False, "rope_parameters": LLAMA3},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 12},
    "linear": {"model_type": "llama", "rope_parameters": LINEAR},
    "yarn": {"model_type": "qwen2", "rope_parameters": YARN},
    "yarn mscale": {
        "model_type": "qwen3",
        "head_dim": 12,
        "rope_parameters": YARN | {"mscale": 1.5, "mscale_all_dim": 0.5},
    },
    "yarn factor": {"model_type": "llama", "rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 4.0}},
}
"""Untied with scaled rotary embeddings; tied with biases; norms of queries and keys, and heads of another width. Then
rotary embeddings of other types."""


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory) -> dict[str, str]:
    """A Hugging Face directory of each of the `KINDS`, with norms and biases that are not all equal."""
    found = {}
    for name, kind in KINDS.items():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES, **kind), dtype=torch.float32)
        with torch.no_grad():
            for param in model.parameters():
                if param.dim() == 1:
                    param.add_(torch.randn_like(param) * 0.2)
        found[name] = str(tmp_path_factory.mktemp("models") / name)
        model.save_pretrained(found[name])
    return found


@pytest.fixture
def make_config():
    """``make_config(2, {"actor.optim.lr": 0.1})``: a config with tensor parallelism 2."""

    def make(tensor_parallel: int, changes: dict[str, Any] | None = None) -> Config:
        plain = {
            "actor.training_backend": "megatron",
            "actor.megatron.tensor_model_parallel_size": tensor_parallel,
            "actor.megatron.pipeline_model_parallel_size": 1,
            "actor.megatron.sequence_parallel": False,
            "actor.megatron.recompute_granularity": None,
            "actor.megatron.make_vocab_size_divisible_by": 4,  # 56 rows for 50 tokens with two ranks: 28 and 22
            "actor.optim.lr": 0.01,
            "actor.optim.adam_eps": 1e-4,  # large, so that rounding near 0 stays small
            "actor.optim.weight_decay": 0.1,
            "actor.optim.clip_grad": 0.5,
        }
        config = Config()
        for key, value in {**plain, **(changes or {})}.items():
            *path, last = key.split(".")
            section: Any = config
            for name in path:
                section = getattr(section, name)
            setattr(section, last, value)
        return config

    return make


def made_up_groups() -> list[Group]:
    """Three prompts with two responses each, of different lengths."""
    generator = np.random.default_rng(5)

    def response(index: int) -> Response:
        ids = generator.integers(0, 50, generator.integers(3, 12))
        mask = np.ones(len(ids), dtype=bool)
        return Response(
            sample_index=index, token_ids=ids, loss_mask=mask, logprobs=None, finished=True, text="", weights_step=0
        )

    def group(index: int) -> Group:
        ids = tuple(generator.integers(0, 50, 4 + 3 * index).tolist())
        problem = Problem(problem_id=index, prompt="", answer="", prompt_ids=ids, source="test")
        return Group(prompt=Prompt(prompt_index=index, epoch=0, problem=problem), responses=(response(0), response(1)))

    return [group(index) for index in range(3)]


def units_of(groups):
    """Three units, one per group; each token has a weight of its own."""
    settings = SplitSettings(
        num_minibatches=1, shuffle_seed=None, rows_for_forward=2, rows_for_update=2, max_tokens=None
    )
    batch = StepBatch(StepRows(groups, step=1, settings=settings), [True] * 6)
    num = int(batch.num_tokens_N.sum())
    weight = torch.randn(num, generator=torch.Generator().manual_seed(9)) / num
    (mini_batch,) = batch.for_update({Column.ADVANTAGE: weight}, batch.num_tokens_N > 0)
    return list(mini_batch.units), weight


@pytest.fixture(scope="session")
def made_up():
    """Groups, their units, and a weight per token."""
    groups = made_up_groups()
    return groups, *units_of(groups)


@pytest.fixture(scope="session")
def reference():
    """``reference(model_dir, config, groups, weight, num_steps)``: what the ranks should compute, by transformers."""
    return _by_transformers


def _by_transformers(model_dir, config, groups, weight, num_steps):
    """The same in float64 with transformers' attention, a row at a time, and ordinary autograd."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64, attn_implementation="eager")
    optim = config.actor.optim
    decay = [param for param in model.parameters() if param.dim() > 1]
    others = [param for param in model.parameters() if param.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": decay, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=optim.lr,
        betas=(optim.adam_beta1, optim.adam_beta2),
        eps=optim.adam_eps,
    )
    found = {"norms": []}
    for step in range(num_steps):
        logprobs, entropies = [], []
        for group in groups:
            for response in group.responses:
                prompt = torch.tensor(group.prompt.problem.prompt_ids)
                targets = torch.from_numpy(response.token_ids)
                logits = model(input_ids=torch.cat([prompt, targets])[None]).logits[0, len(prompt) - 1 : -1]
                all_logprobs = logits.log_softmax(-1)
                logprobs.append(all_logprobs.gather(1, targets[:, None])[:, 0])
                entropies.append(-(all_logprobs.exp() * all_logprobs).sum(-1))
        total = (weight * torch.cat(logprobs)).sum() + 0.3 * (weight * torch.cat(entropies)).sum()
        adam.zero_grad()
        total.backward()
        if step == 0:
            found["logprobs"] = torch.cat(logprobs).detach()
            found["gradients"] = {name: param.grad.clone() for name, param in model.named_parameters()}
        found["norms"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad).item())
        adam.step()
        found["loss"] = total.item()
    found["weights"] = {name: param.detach() for name, param in model.named_parameters()}
    return found
