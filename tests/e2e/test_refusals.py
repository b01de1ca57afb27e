"""Bad input: one clear line, an exit code, no traceback wall, and nothing lost."""

from __future__ import annotations

import shutil

import pytest


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("runner.max_stepz=3", "runner.max_stepz: unknown key; did you mean runner.max_steps?"),
        ("runner.max_steps=many", "runner.max_steps: Value 'many' of type 'str' could not be converted to Integer"),
        ("algorithm.n_minibatches=3", "algorithm.n_minibatches=3: does not divide data.rollout_batch_size=8"),
        ("actor.enable_offload=true", "actor.enable_offload=True: is not implemented"),
        ("cluster.component_placement.critic=0", "unknown component 'critic'"),
        ("runner.output_dir=/dev/null/logs", "runner.logger.log_path: cannot write in /dev/null/logs"),
    ],
)
def test_before_anything_is_started(new_run, override, said):
    printed = new_run({}).finish(override, expect=2)
    assert f"error: {said}" in printed or said in printed
    assert "Traceback" not in printed and len(printed.splitlines()) <= 3


def test_nothing_silently_starts_over(new_run, module_run):
    run = module_run("short", {"runner.max_steps": "1", "runner.val_check_interval": "-1"})
    run.finish()
    kept = run.data_digest(1)

    assert "already holds global_step_1; go on with runner.resume_dir=auto" in run.oneline()
    missing = run.oneline(f"runner.resume_dir={run.checkpoints / 'global_step_7'}")
    assert "no such checkpoint" in missing and "holds global_step_1" in missing
    changed = run.oneline("runner.resume_dir=auto", "actor.optim.adam_beta2=0.9")
    assert "actor.optim.adam_beta2: 0.95 -> 0.9" in changed and "runner.resume_allow_changes" in changed
    more = run.oneline("runner.resume_dir=auto", "runner.max_steps=2")
    assert "actor.optim.total_training_steps: 1 -> 2" in more
    files = run.oneline(
        "runner.resume_dir=auto", "data.type=math", f"data.train_data_paths=[{run.root / 'none.jsonl'}]"
    )
    assert "data.train_data_paths" in files and "none.jsonl" in files

    assert run.data_digest(1) == kept
    assert "nothing to do" in run.finish("runner.resume_dir=auto")


def test_checkpoint_of_another_model(new_run, module_run, other_model):
    run = module_run("short", {"runner.max_steps": "1", "runner.val_check_interval": "-1"})
    other = new_run({"actor.model.model_path": str(other_model), "runner.max_steps": "1"})
    shutil.copytree(run.checkpoints / "global_step_1", other.checkpoints / "global_step_1")
    said = other.oneline("runner.resume_dir=auto", "runner.val_check_interval=-1")
    assert "actor.model (base weights)" in said
    allowed = "runner.resume_allow_changes=['actor.model (base weights)']"
    said = other.oneline("runner.resume_dir=auto", "runner.val_check_interval=-1", allowed)
    assert "checkpoint of another model" in said and "model.layers.0" in said
