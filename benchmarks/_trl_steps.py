"""A GRPO run of TRL for benchmarks/step.py, in the environment of `_peers`: prints the seconds of each step as JSON.

.venv-peers/bin/python benchmarks/_trl_steps.py TASK.json
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _made_up_reward import score
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Clock(TrainerCallback):
    """Notes when each step ends; its first time is the beginning of the first step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if not self.times:
            self.times.append(time.perf_counter())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())


def exact(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(text.strip() == wanted) for text, wanted in zip(completions, answer, strict=True)]


def made_up(completions: list[str], **_: Any) -> list[float]:
    return [score(response=text) for text in completions]


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(task["threads"])
    clock, rows = Clock(), task["num_prompts"] * task["group_size"]
    with tempfile.TemporaryDirectory() as directory:
        settings = GRPOConfig(
            output_dir=directory,
            max_steps=task["steps"],
            bf16=False,
            use_cpu=True,
            use_vllm=False,
            per_device_train_batch_size=task["micro_batch"],
            gradient_accumulation_steps=rows // task["micro_batch"],
            num_generations=task["group_size"],
            max_completion_length=task["max_new_tokens"],
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            beta=0.0,
            learning_rate=task["lr"],
            adam_beta2=0.95,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            logging_steps=10,
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32),
            reward_funcs={"exact": exact, "made_up": made_up}[task["reward"]],
            args=settings,
            train_dataset=Dataset.from_list(task["rows"]),
            processing_class=AutoTokenizer.from_pretrained(task["model"]),
            callbacks=[clock],
        )
        trainer.train()
    seconds = [after - before for before, after in itertools.pairwise(clock.times)]
    logged = [row for row in trainer.state.log_history if "completions/mean_length" in row]
    lengths = logged[-1]["completions/mean_length"] if logged else None
    print(json.dumps({"seconds": seconds, "mean_length": lengths}))


if __name__ == "__main__":
    main()
