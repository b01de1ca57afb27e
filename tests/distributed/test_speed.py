"""A guard against slower steps: this project beside plain transformers in the same process, by processor time.

Rows 1 and 3 of docs/performance.md in small. The limits are wide, so that only half the speed fails.
"""

from __future__ import annotations

import runpy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

UPDATES = Path(__file__).parents[2] / "benchmarks" / "_updates.py"
ROUNDS = 5


def updates() -> dict[str, Any]:
    """The functions of the benchmarks."""
    return runpy.run_path(str(UPDATES))


def ratio(ours: Callable[[], object], plain: Callable[[], object]) -> float:
    """Processor seconds of ours by those of plain transformers: the median of pairs, after a first one."""

    def seconds(work: Callable[[], object]) -> float:
        began = time.process_time()
        work()
        return time.process_time() - began

    pairs = [seconds(ours) / seconds(plain) for _ in range(1 + ROUNDS)]
    return statistics.median(pairs[1:])


def update_ratio(rank: int, world_size: int, directory: Path) -> float:
    """Row 3: an update, 4 responses of 127 tokens to prompts of one."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.nn import functional
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from rlinf_lite.training.ranks import shard_mini_batch

    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None}
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 4096}
    LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **sizes, **ends)).save_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    made = updates()
    trainer = made["policy"](directory, init_device_mesh("cpu", (1,)))
    whole = made["mini_batch"](made["responses"]([1] * 4, 1, [127] * 4, 4096), 4)
    (batch,) = shard_mini_batch(whole, 1, virtual_ranks=made["VIRTUAL_RANKS"])

    def ours() -> None:
        trainer.forward_backward(batch, made["LOSS"])
        trainer.optim_step(1e-6)

    ids_BT = torch.randint(0, 4096, (4, 128))

    def plain() -> None:
        logits = model(ids_BT, use_cache=False).logits[:, :-1]
        logprobs = -functional.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
        (logprobs - logprobs.detach()).exp().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return ratio(ours, plain)


def step_ratio(rank: int, world_size: int) -> float:
    """Row 1: generation, grading and update of the embedded default, in one process."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.nn import functional
    from transformers import AutoModelForCausalLM

    from rlinf_lite.config import ArithmeticConfig
    from rlinf_lite.data.arithmetic import generate_sums
    from rlinf_lite.models import hf_directory
    from rlinf_lite.rewards import attach_scores, generated, grading_items
    from rlinf_lite.rewards.exact import ExactGrader
    from rlinf_lite.rollout.builtin import BuiltinEngine
    from rlinf_lite.training.ranks import shard_mini_batch
    from rlinf_lite.types import GenerationBatch, Problem, Prompt, Sampling

    directory = hf_directory.resolve("embedded:tiny-arithmetic")
    tokenizer = hf_directory.load_tokenizer(directory)
    sums = generate_sums(ArithmeticConfig(num_problems=64), "train")
    prompts = [tokenizer(sum_.content)["input_ids"] for sum_ in sums]
    problems = [
        Problem(problem_id=i, prompt=sum_.content, answer=sum_.answer, prompt_ids=tuple(ids), source="")
        for i, (sum_, ids) in enumerate(zip(sums, prompts, strict=True))
    ]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    given = {"eos_ids": frozenset({tokenizer.eos_token_id}), "return_logprobs": False, "max_rows": 512}
    engine = BuiltinEngine(model, tokenizer, **given)
    sampling = Sampling(do_sample=True, temperature=1.0, top_k=-1, top_p=1.0, repetition_penalty=1.0, max_new_tokens=4)
    batch = GenerationBatch(
        stream="train", step=1, index=0, group_size=8, sampling=sampling, seed=1,
        prompts=tuple(Prompt(prompt_index=p.problem_id, epoch=0, problem=p) for p in problems),
    )  # fmt: skip
    made, grader = updates(), ExactGrader()
    trainer = made["policy"](directory, init_device_mesh("cpu", (1,)))

    def ours() -> None:
        groups = engine.generate(batch)
        scores = grader.score(grading_items(generated(groups)))
        whole = made["mini_batch"](attach_scores(groups, scores), 256)
        trainer.forward_backward(*shard_mini_batch(whole, 1, virtual_ranks=made["VIRTUAL_RANKS"]), made["LOSS"])
        trainer.optim_step(1e-6)

    other = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-6, fused=True)
    ids_BP = torch.tensor(prompts).repeat_interleave(8, 0)

    def plain() -> None:
        with torch.no_grad():
            ids = other.generate(ids_BP, do_sample=True, top_k=0, max_new_tokens=4, pad_token_id=0)
        kept = ids.shape[1] - ids_BP.shape[1]
        logits = other(ids, use_cache=False, logits_to_keep=kept + 1).logits[:, :-1]
        logprobs = -functional.cross_entropy(logits.flatten(0, 1), ids[:, -kept:].flatten(), reduction="none")
        (logprobs - logprobs.detach()).exp().mean().backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return ratio(ours, plain)


def test_an_update_takes_at_most_twice_the_time_of_plain_torch(run_ranks, tmp_path):
    assert run_ranks(update_ratio, 1, directory=tmp_path)[0] < 2 / 0.95


def test_a_step_takes_no_longer_than_one_of_plain_transformers(run_ranks):
    assert run_ranks(step_ratio, 1)[0] < 1.0
