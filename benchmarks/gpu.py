"""Generation and whole steps on one GPU, beside TRL's on the same work, in one call.

    python benchmarks/gpu.py [--shape qwen2.5-0.5b] [--tokens 512] [--steps 3] [--only engine,price,run,trl,resume]

    engine  tokens per second of the builtin engine, 16 prompts x 8 responses, and how many of its log-probs are not the
            trainer's
    price   the same with cluster.deterministic=false
    run     a training run: seconds per step and of its parts
    trl     GRPOTrainer with `generate`: seconds per step (an environment with the extra "bench")
    resume  the run once more, saved after every step, killed and resumed: are all of its metrics equal? (after run)

Weights are random, so responses are noise of full length. Every part runs in a process of its own. Without a GPU, with
the shape "tiny" and few tokens, it shows that it works, no more.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _random_model
import numpy as np

PROMPTS, GROUP = 16, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=_random_model.SHAPES)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", default="engine,price,run,trl,resume")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    on_gpu = _has_gpu()
    options.shape = options.shape or ("qwen2.5-0.5b" if on_gpu else "tiny")
    options.tokens = options.tokens or (512 if on_gpu else 8)
    parts: dict[str, Callable[[argparse.Namespace, str], None]] = {
        "engine": measure_engine,
        "price": lambda options, device: measure_engine(options, device, deterministic=False),
        "run": measure_run,
        "trl": measure_trl,
        "resume": check_resume,
    }
    if options.part:
        parts[options.part](options, "cuda" if on_gpu else "cpu")
        return
    with tempfile.TemporaryDirectory() as directory:
        for part in options.only.split(","):
            print(f"-- {part}: {options.shape}, {PROMPTS} x {GROUP}, {options.tokens} tokens", flush=True)
            given = ["--part", part, "--directory", directory]
            given += ["--shape", options.shape, "--tokens", str(options.tokens), "--steps", str(options.steps)]
            subprocess.run([sys.executable, __file__, *given], check=False)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


# -- the engine


def measure_engine(options: argparse.Namespace, device: str, *, deterministic: bool = True) -> None:
    import torch

    from rlinf_lite import numerics
    from rlinf_lite.models import hf_directory
    from rlinf_lite.rollout.builtin import BuiltinEngine

    numerics.fix(device, deterministic=deterministic)
    model = _random_model.make(options.shape, device)
    tokenizer = hf_directory.load_tokenizer(hf_directory.resolve("embedded:tiny-arithmetic"))
    engine = BuiltinEngine(model, tokenizer, eos_ids=frozenset(), return_logprobs=True, max_rows=PROMPTS * GROUP)
    for round_ in range(3):
        batch, began = _batch(options.tokens, step=round_), time.perf_counter()
        groups = engine.generate(batch)
        seconds = time.perf_counter() - began
        print(
            f"{'first' if round_ == 0 else 'again'}: {seconds:.2f} s, {options.tokens / seconds:.0f} steps/s, "
            f"{PROMPTS * GROUP * options.tokens / seconds:.0f} tokens/s",
            flush=True,
        )
    if device == "cuda":
        print(f"peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB of GPU memory")
    differ, num, largest = _gap(options.shape, groups, device)
    print(f"{differ} of {num} log-probs are not the trainer's; largest difference {largest:.1e}", flush=True)


def _batch(max_new_tokens: int, step: int) -> Any:
    from rlinf_lite.types import GenerationBatch, Problem, Prompt, Sampling

    prompts = tuple(
        Prompt(
            prompt_index=i,
            epoch=0,
            problem=Problem(problem_id=i, prompt="", answer="", prompt_ids=(1, *range(3, 8 + i % 5)), source="made"),
        )
        for i in range(PROMPTS)
    )
    sampling = Sampling(
        do_sample=True, temperature=1.0, top_k=-1, top_p=1.0, repetition_penalty=1.0, max_new_tokens=max_new_tokens
    )
    return GenerationBatch(
        stream="train", step=step, index=0, prompts=prompts, group_size=GROUP, sampling=sampling, seed=5
    )


def _gap(shape: str, groups: list[Any], device: str) -> tuple[int, int, float]:
    import torch

    from rlinf_lite.models.scored import ScoredModel
    from rlinf_lite.models.segments import FlatTokens
    from rlinf_lite.training.batch import SplitSettings, StepBatch, StepRows

    model = ScoredModel(_random_model.make(shape, device))
    settings = SplitSettings(
        num_minibatches=1, shuffle_seed=None, rows_for_forward=8, rows_for_update=8, max_tokens=None
    )
    differ, num, largest = 0, 0, 0.0
    engine = np.concatenate([r.logprobs for group in groups for r in group.responses])
    for unit in StepBatch(StepRows(groups, step=1, settings=settings), [True] * (PROMPTS * GROUP)).for_forward():
        tokens = FlatTokens.of(unit.ids_N, unit.positions_N, unit.segments, torch.device(device))
        given = tokens.ids_N, tokens.positions_N, tokens.layout, unit.source_M.to(device), unit.targets_M.to(device)
        with torch.no_grad():
            found = model(*given, 1.0, False)[0].cpu().numpy()
        wanted = engine[num : num + len(found)]
        differ, num = differ + int((found != wanted).sum()), num + len(found)
        largest = max(largest, float(np.abs(found - wanted).max()))
    return differ, num, largest


# -- training runs


def measure_run(options: argparse.Namespace, device: str) -> None:
    model, out = options.directory / "model", options.directory / "straight"
    _train(options, device, _random_model.save(options.shape, model, device), out, "runner.save_interval=-1")
    for row in _rows(out):
        names = ("step", "rollout", "sync", "reward", "update", "logprobs")
        parts = ", ".join(f"{name} {row[f'time/{name}']:.2f}" for name in names if f"time/{name}" in row)
        memory = {key: round(value, 1) for key, value in row.items() if key.startswith("memory/")}
        print(f"step {row['step']}: {parts} s; {memory}", flush=True)


def check_resume(options: argparse.Namespace, device: str) -> None:
    model, out = options.directory / "model", options.directory / "killed"
    _train(options, device, model, out, kill_after=options.steps - 1)
    _train(options, device, model, out, "runner.resume_dir=auto")
    one, other = _rows(options.directory / "straight"), _rows(out)
    timed = ("time/", "memory/", "throughput/", "save/")
    different = {
        key
        for a, b in zip(one, other, strict=True)
        for key in a.keys() | b.keys()
        if not key.startswith(timed) and a.get(key) != b.get(key)
    }
    print(
        f"killed after step {options.steps - 1} and resumed: {len(one)} rows, metrics that differ: "
        f"{different or 'none'}; gaps {[row.get('policy/rollout_logprob_gap') for row in other]}",
        flush=True,
    )


def _train(
    options: argparse.Namespace, device: str, model: Path, out: Path, *more: str, kill_after: int | None = None
) -> None:
    given = [
        f"runner.max_steps={options.steps}",
        "runner.save_interval=1",
        "runner.checkpoint.memory_replicas=0",
        "runner.val_check_interval=-1",
        f"runner.output_dir={out}",
        f"runner.seq_length={options.tokens + 32}",
        f"cluster.device={device}",
        "cluster.component_placement.actor=0",
        "cluster.component_placement.rollout=0",
        f"fsdp={'gpu_bf16' if device == 'cuda' else 'cpu_bf16'}",
        "actor.fsdp_config.gradient_checkpointing=false",
        f"actor.model.model_path={model}",
        "rollout.model.precision=bf16",
        f"data.rollout_batch_size={PROMPTS}",
        f"algorithm.group_size={GROUP}",
        "algorithm.n_minibatches=1",
        "algorithm.entropy_bonus=0.01",
        "rollout.return_logprobs=true",
        "algorithm.training_batch_size_per_gpu=16",
        f"algorithm.sampling_params.max_new_tokens={options.tokens}",
        *more,
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "rlinf_lite.main_math", *given],
        stdout=subprocess.DEVNULL if os.environ.get("QUIET") else sys.stderr,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    while process.poll() is None:
        if kill_after is not None and any(out.rglob(f"global_step_{kill_after}/*manifest*")):
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.05)
    if process.returncode and kill_after is None:
        sys.exit(f"the run ended with {process.returncode}")


def _rows(out: Path) -> list[dict[str, Any]]:
    (file,) = out.rglob("metrics.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


# -- TRL


def measure_trl(options: argparse.Namespace, device: str) -> None:
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from rlinf_lite.models import hf_directory

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            print(f"step: {time.perf_counter() - self.began:.2f} s", flush=True)

    settings = GRPOConfig(
        output_dir=str(options.directory / "trl"),
        max_steps=options.steps,
        bf16=device == "cuda",
        use_cpu=device == "cpu",
        use_vllm=False,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=PROMPTS * GROUP // 16,
        num_generations=GROUP,
        max_completion_length=options.tokens,
        top_k=0,
        beta=0.0,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=_random_model.make(options.shape, device).float(),
        reward_funcs=lambda completions, **_: [float(len(text) % 7) for text in completions],
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": f"{i}+{i}="} for i in range(64)]),
        processing_class=hf_directory.load_tokenizer(hf_directory.resolve("embedded:tiny-arithmetic")),
        callbacks=[Clock()],
    )
    trainer.train()
    if device == "cuda":
        print(f"peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB of GPU memory")


if __name__ == "__main__":
    main()
