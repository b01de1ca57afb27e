"""Progress, schedule and identity: the small pure parts of a run."""

from __future__ import annotations

import pytest
import torch

from rlinf_lite import numerics
from rlinf_lite.config import OptimConfig
from rlinf_lite.config.compose import load
from rlinf_lite.errors import ConfigError
from rlinf_lite.recovery.identity import identity, refuse_changes
from rlinf_lite.recovery.prepare import slow_precision
from rlinf_lite.rewards import VerifierStartError
from rlinf_lite.runner.failures import explain
from rlinf_lite.runner.progress import Progress
from rlinf_lite.runner.schedule import due, total_steps, total_updates

FACTS = {
    "base_model": "a",
    "critic_model": None,
    "tokenizer": "t",
    "engine": "e",
    "train_data": "b",
    "val_data": None,
    "initial_weights": None,
}


def test_progress_round_trip():
    before = Progress()
    progress = before.after_step(num_prompts=4, num_samples=8, num_tokens=100)
    assert before == Progress()
    progress.validated(0.5)
    progress.validated(0.5)
    assert Progress.from_state(progress.state()) == progress
    assert (progress.step, progress.cursor, progress.best_val_step) == (1, 4, 1)
    assert [progress.improved("loss", value, "min") for value in (2.0, 2.0, float("nan"), 1.0)] == [
        True,
        False,
        False,
        True,
    ]
    assert not Progress().improved("loss", float("nan"), "max")
    with pytest.raises(ValueError, match="progress holds"):
        Progress.from_state({"step": 1})


def test_a_step_whose_row_is_still_to_come():
    progress = Progress(step=3, unlogged={"reward/mean": 0.1 + 0.2})
    assert (progress.logged_step, Progress(step=3).logged_step) == (2, 3)
    held = Progress()
    held.become(progress)
    progress.unlogged.clear()
    assert held == Progress(step=3, unlogged={"reward/mean": 0.30000000000000004})


def test_total_steps_is_the_nearer_limit():
    runner = load(["runner.max_steps=10", "runner.max_epochs=2"]).runner
    assert total_steps(runner, num_problems=2048, batch=64) == 10
    assert total_steps(runner, num_problems=100, batch=64) == 3  # 200 prompts, 64 per step
    with pytest.raises(ConfigError, match=r"raise runner\.max_epochs to 64"):
        total_steps(runner, num_problems=1, batch=64)


def test_total_updates():
    assert total_updates(OptimConfig(), 10, num_minibatches=4) == 40
    assert total_updates(OptimConfig(total_training_steps=7), 10, num_minibatches=4) == 7


@pytest.mark.parametrize(
    ("step", "interval", "last", "expected"),
    [(50, 50, 100, True), (49, 50, 100, False), (7, -1, 7, True), (6, -1, 7, False)],
)
def test_due(step, interval, last, expected):
    assert due(step, interval, last) is expected


def test_identity_refuses_by_name_and_allows_by_name():
    config = load([])
    facts = {**FACTS, "total_updates": 100}
    saved = identity(config, **facts)
    assert refuse_changes(saved, identity(config, **facts), [], "global_step_5") == []
    config.actor.optim.lr = 1.0
    now = identity(config, **{**facts, "train_data": "c"})
    with pytest.raises(ConfigError) as caught:
        refuse_changes(saved, now, ["actor.optim.lr"], "global_step_5")
    assert "data (training problems): b -> c" in str(caught.value) and "actor.optim.lr:" not in str(caught.value)
    allowed = refuse_changes(saved, now, ["actor.optim.lr", "data (training problems)"], "global_step_5")
    assert len(allowed) == 2
    with pytest.raises(ConfigError, match=r"'actor\.lr' is not a key"):
        refuse_changes(saved, now, ["actor.lr"], "global_step_5")


def test_identity_ignores_the_decay_of_a_constant_rate():
    config = load(["actor.optim.lr_scheduler=constant"])
    facts = FACTS
    assert identity(config, **facts, total_updates=1) == identity(config, **facts, total_updates=2)


def test_identity_holds_validation_data_against_each_other_only():
    config = load([])
    without = identity(config, **FACTS, total_updates=1)
    one, other = (identity(config, **{**FACTS, "val_data": name}, total_updates=1) for name in "xy")
    assert refuse_changes(without, one, [], "c") == []
    with pytest.raises(ConfigError, match=r"data \(validation problems\): x -> y"):
        refuse_changes(one, other, [], "c")


def test_bf16_on_a_processor_without_it_is_said():
    bf16 = load(["smollm2-135m-sums"])
    said = slow_precision(bf16.actor, bf16.rollout.model, "cpu", "AVX2")
    assert "param_dtype=bf16 and rollout.model.precision=bf16: this processor" in said
    assert "actor.model.precision" not in said  # it stores fp32
    assert slow_precision(bf16.actor, bf16.rollout.model, "cuda", "AVX2") is None
    assert slow_precision(bf16.actor, bf16.rollout.model, "cpu", "AVX512") is None
    fp32 = load([])
    assert slow_precision(fp32.actor, fp32.rollout.model, "cpu", "AVX2") is None


def test_a_verifier_that_cannot_start_is_for_the_user_to_solve():
    error = VerifierStartError("math-verify cannot read LaTeX; pip install it")
    assert explain(error) == (f"error: {error}", 2)


def test_full_gpu_memory_is_for_the_user_to_solve():
    message, code = explain(numerics.user_error(torch.OutOfMemoryError("CUDA out of memory.")))
    assert code == 2 and "lower runner.max_tokens_per_mbs or algorithm.training_batch_size_per_gpu" in str(message)
