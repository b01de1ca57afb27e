"""Fixtures: the directory of a run, written by the sinks of a real run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rlinf_lite.observability import EventLog, JsonlSink
from rlinf_lite.observability.events import RECOVERED, RECOVERY_SECONDS, RESTART, RESUME, SAVE, START

HURTS = (
    "</script><script>document.title='broken'</script><img src=x onerror=alert(1)> \u202e ü 漢 😀 \x00 \ud800 & | ` \\"
)


def metrics_of(step: int) -> dict[str, float]:
    metrics = {
        "reward/mean": 1 - 1 / step,
        "reward/accuracy": 1 - 1 / step,
        "loss/total": (-1) ** step / step,
        "policy/clip_fraction": 0.0,
        "policy/entropy": 2 / step,
        "optim/lr": 1e-4,
        "strange/<b>metric": float(step),
        "time/rollout": 2.0,
        "time/update": 1.0,
        "time/step": 3.5,
        "throughput/tokens_per_second": 1000.0 + step,
        "memory/actor_gb": 0.5 + step / 100,
    }
    return metrics | ({"val/accuracy": 0.9 if step == 10 else 0.8} if step % 5 == 0 else {})


def sample_of(step: int, index: int) -> dict:
    text = f"answer {step}.{index} {HURTS}" + " long" * (200 if index == 1 else 0)
    row = {"prompt_id": step, "sample": index, "prompt_ids": [1, 2], "prompt": f"{HURTS} 1+{step}=", "text": text}
    failed = {"reward": None, "error": "the verifier <i>died</i>"}
    return row | (failed if index == 2 else {"reward": 0.25, "reward/brevity": -0.5, "error": None})


@pytest.fixture
def make_run(tmp_path) -> Callable[..., Path]:
    """``make_run("name", 30, lr=...)``: a run of 40 planned steps that lost a worker and was resumed after step 20."""

    def make(name: str = "run", num_steps: int = 30, lr: float = 1e-4) -> Path:
        directory = tmp_path / name
        metrics = JsonlSink(directory / "metrics.jsonl", committed_step=None)
        rollouts = JsonlSink(directory / "rollouts.jsonl", committed_step=None)
        for step in range(1, num_steps + 1):
            rollouts.log_rows(step, [sample_of(step, index) for index in range(4)])
            metrics.log(step, metrics_of(step))
        metrics.close()
        rollouts.close()
        for file, resume_dir in (("config.yaml", None), ("config.from_step_20.yaml", "auto")):
            settings = {"experiment_name": f"<{name}>", "max_steps": 40, "resume_dir": resume_dir, "hang_timeout": 60}
            if resume_dir:
                settings["hang_timeout"] = 30
            tree = {"runner": settings, "actor": {"optim": {"lr": lr}, "model": {"model_path": "<tiny>"}}}
            (directory / file).write_text(yaml.safe_dump(tree))
        events = EventLog(directory / "events.jsonl", clock=lambda: 1.7e9)
        events.add(START, 0)
        for step in (10, 20):
            cost = {
                "time/save_stall": 0.02,
                "time/save_durable": 0.5,
                "save/num_bytes": 2e6,
                "save/gb_per_second": 4e-3,
            }
            events.add(SAVE, step, "", cost)
            (directory / "checkpoints" / f"global_step_{step}").mkdir(parents=True)
            (directory / "checkpoints" / f"global_step_{step}" / "manifest.json").write_text("{}")
        events.add(RESTART, 20, f"ActorGroup rank 1 was lost {HURTS}")
        events.add(RECOVERED, 21, "recovered in 1.22 s: rebuild 1.22", {RECOVERY_SECONDS: 1.22})
        events.add(RESUME, 20, "/x/checkpoints/global_step_20")
        return directory

    return make


@pytest.fixture
def run(make_run) -> Path:
    return make_run()
