"""Rows 1, 1b and 2: a whole GRPO step beside TRL's `GRPOTrainer`, with the same model, prompts, group and lengths.

    python benchmarks/step.py [--only 1 1b 2] [--rounds 3] [--out FILE]

    1   the embedded default as shipped (2 actor ranks, replicas, a spare), 64 prompts x 8 responses
    1b  the same with one actor rank of 2 threads
    2   SmolLM2-135M's shape with random weights, 4 prompts of 200 tokens x 8 responses of 64, fp32

Each figure is a whole run in processes of its own: seconds from the end of a step to the end of the next one, median
after the first steps. TRL, in an environment of its own (`_peers`), has one process with as many threads as cores.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _peers
import _random_model
from _paired import Row, arguments, finish, in_turn, number_of_threads

from rlinf_lite.config import ArithmeticConfig
from rlinf_lite.data.arithmetic import generate_sums
from rlinf_lite.models import hf_directory

HERE = Path(__file__).parent
THREADS = 2
_STEP = re.compile(r"step +(\d+)/")


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A training run, ours and TRL's."""

    what: str
    goal: float
    overrides: list[str] = field(default_factory=list)
    """Of our run, after the config's name if it is not the embedded default."""
    task: dict[str, Any] = field(default_factory=dict)
    """Of `_trl_steps.py`."""
    steps: int
    skipped: int
    """First steps that do not count."""


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--only", nargs="+", choices=("1", "1b", "2"), default=["1", "1b", "2"], help="default: all")
    options = parser.parse_args()
    other = f"{_peers.version('trl')} GRPOTrainer"
    rows = []
    with tempfile.TemporaryDirectory() as made:
        for number in options.only:
            work = smollm2(Path(made)) if number == "2" else embedded(one_rank=number == "1b")
            row = Row(number=number, work=f"a GRPO step, {work.what}", other=other, goal=work.goal)
            seen: dict[str, Any] = {}
            in_turn(row, *sides(work, seen), options.rounds)
            row.details |= seen
            rows.append(row)
    finish(rows, options.out)


def embedded(*, one_rank: bool) -> Work:
    """The embedded default; TRL gets all 512 responses as one batch, which is its fastest."""
    rows = [{"prompt": sum_.content, "answer": sum_.answer} for sum_ in generate_sums(ArithmeticConfig(), "train")]
    others = ["cluster.component_placement.actor=0", f"cluster.threads_per_worker={THREADS}"] if one_rank else []
    return Work(
        what="the embedded default" + (" with one actor rank of 2 threads" if one_rank else ", 2 ranks"),
        goal=0.4 if one_rank else 0.5,
        overrides=["runner.max_steps=40", *others],
        task={
            "model": str(hf_directory.resolve("embedded:tiny-arithmetic")),
            "rows": rows,
            "reward": "exact",
            "num_prompts": 64,
            "group_size": 8,
            "micro_batch": 512,
            "max_new_tokens": 4,
            "lr": 3e-4,
        },
        steps=40,
        skipped=5,
    )


def smollm2(directory: Path) -> Work:
    model, data = directory / "model", directory / "train.jsonl"
    _random_model.save("smollm2-135m", model, words=True)
    draw = random.Random(1)
    prompts = [" ".join(f"w{draw.randrange(4, 49_152)}" for _ in range(199)) for _ in range(64)]  # and <bos>
    rows = [{"prompt": prompt, "answer": "none"} for prompt in prompts]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = {
        "runner.max_steps": 3,
        "runner.save_interval": -1,
        "runner.val_check_interval": -1,
        "runner.seq_length": 272,
        "fsdp": "cpu",
        "rollout.model.precision": "fp32",
        "rollout.return_logprobs": "false",
        "algorithm.importance_sampling_fix": "false",
        "algorithm.sampling_params.max_new_tokens": 64,
        "actor.model.model_path": model,
        "data.type": "math",
        "data.train_data_paths": f"[{data}]",
        "data.max_prompt_length": 208,
        "data.rollout_batch_size": 4,
        "data.apply_chat_template": "false",
        "data.system_prompt": "null",
        "data.few_shot": "[]",
        "reward.reward_type": "custom",
        "reward.path": f"{HERE / '_made_up_reward.py'}:score",
    }
    return Work(
        what="SmolLM2-135M's shape, 4 x 8, 200 + 64 tokens, fp32, 2 ranks",
        goal=0.6,
        overrides=["smollm2-135m-sums", *(f"{key}={value}" for key, value in overrides.items())],
        task={
            "model": str(model),
            "rows": rows,
            "reward": "made_up",
            "num_prompts": 4,
            "group_size": 8,
            "micro_batch": 8,
            "max_new_tokens": 64,
            "lr": 2e-5,
        },
        steps=3,
        skipped=1,
    )


def sides(work: Work, seen: dict[str, Any]) -> tuple[Callable[[], float], Callable[[], float]]:
    """Our run and TRL's: median seconds per step. ``seen`` is filled with what they show besides."""

    def ours() -> float:
        with tempfile.TemporaryDirectory() as directory:
            seconds = ours_per_step([*work.overrides, f"runner.output_dir={directory}"])
            (file,) = Path(directory).rglob("metrics.jsonl")
            metrics = [json.loads(line) for line in file.read_text().splitlines()][work.skipped :]
        phases = sorted({key for row in metrics for key in row if key.startswith("time/")} - {"time/step"})
        seen["phases of ours, s"] = ", ".join(
            f"{key.removeprefix('time/')} {statistics.median(row.get(key, 0.0) for row in metrics):.3f}"
            for key in phases
        )
        seen["tokens per response, ours"] = round(statistics.mean(row["length/response_mean"] for row in metrics), 2)
        return statistics.median(seconds[work.skipped - 1 :])

    def trl() -> float:
        task = {**work.task, "steps": work.steps, "threads": THREADS}
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(task, file)
            file.flush()
            found = json.loads(_output([_peers.python(), HERE / "_trl_steps.py", file.name]).splitlines()[-1])
        seen["tokens per response, TRL"] = found["mean_length"]
        return statistics.median(found["seconds"][work.skipped :])

    return ours, trl


def ours_per_step(overrides: list[str]) -> list[float]:
    """Run training; seconds from the end of each step to that of the next: one less than there are steps."""
    command = [sys.executable, "-u", "-m", "rlinf_lite.main_math", *overrides]
    ends, printed = [], []
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            if _STEP.match(line):
                ends.append(time.perf_counter())
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(printed[-40:])}")
    return [after - before for before, after in itertools.pairwise(ends)]


def _output(command: list[Any]) -> str:
    environment = {**os.environ, **number_of_threads(THREADS), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
