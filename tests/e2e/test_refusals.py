"""Bad input: one clear line, an exit code, no traceback wall, and nothing lost."""

from __future__ import annotations

import shutil

import pytest

from rlinf_lite.config.compose import load
from rlinf_lite.errors import EXIT_USER_ERROR
from rlinf_lite.recovery.directories import make_directories
from rlinf_lite.recovery.prepare import prepare
from rlinf_lite.runner.failures import explain

pytestmark = pytest.mark.timeout(900)

AUTO = "runner.resume_dir=auto"


def test_before_anything_is_started(new_run):
    printed = new_run({}).finish("runner.max_stepz=3", expect=2)
    assert "runner.max_stepz: unknown key; did you mean runner.max_steps?" in printed
    assert "Traceback" not in printed and len(printed.splitlines()) <= 3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("runner.max_steps=many", "runner.max_steps=many: takes a whole number"),
        ("algorithm.n_minibatches=3", "algorithm.n_minibatches=3: does not divide data.rollout_batch_size=8"),
        ("actor.mcore_gpt=false", "actor.mcore_gpt=false: the model is Megatron-core's; set it to true"),
        ("runner.output_dir=/dev/null/logs", "cannot write in /dev/null/logs"),
    ],
)
def test_a_config_that_cannot_be_run(new_run, override, said):
    with pytest.raises(Exception) as caught:
        make_directories(load(new_run({}).arguments(override)).runner)
    message, code = explain(caught.value)
    assert message is not None and said in message and code == EXIT_USER_ERROR
    assert len(message.splitlines()) <= 3


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "already holds global_step_8 and 7 more; resume with runner.resume_dir=auto"),
        (["runner.resume_dir={checkpoints}/global_step_70"], "no such checkpoint"),
        (["runner.resume_dir={checkpoints}"], "not a global_step_N directory"),
        ([AUTO, "actor.optim.adam_beta2=0.9"], "actor.optim.adam_beta2: 0.95 -> 0.9"),
        ([AUTO, "runner.max_steps=9"], "actor.optim.total_training_steps: 8 -> 9"),
        ([AUTO, "data.arithmetic.num_problems=25"], "data (training problems)"),
        ([AUTO, "data.type=math", "data.train_data_paths=[none.jsonl]", "data.val_data_paths=[x]"], "none.jsonl"),
        ([AUTO, "actor.model.model_path=/nowhere"], "actor.model.model_path=/nowhere: no model found"),
    ],
)
def test_nothing_silently_starts_over_or_changes(straight, overrides, said):
    before = straight.data_digest(8)
    config = load(straight.arguments(*(text.format(checkpoints=straight.checkpoints) for text in overrides)))
    with pytest.raises(Exception) as caught:
        prepare(config, straight.checkpoints)
    message, code = explain(caught.value)
    assert message is not None and said in message and code == EXIT_USER_ERROR
    assert len(message.splitlines()) <= 5
    assert straight.data_digest(8) == before


def test_the_launcher_refuses_and_a_finished_run_has_nothing_to_do(straight, new_run):
    copy = new_run({})
    shutil.copytree(straight.directory, copy.directory)
    printed = copy.finish(expect=2)
    assert "already holds" in printed and "Traceback" not in printed and len(printed.splitlines()) == 2
    assert "nothing to do" in copy.finish(AUTO)
    assert copy.rows() == straight.rows() and copy.steps() == straight.steps()


@pytest.mark.soak  # shorter: tests/unit/checkpoint/test_manager.py
def test_checkpoint_of_another_model(straight, new_run, other_model):
    other = new_run({"actor.model.model_path": str(other_model)})
    shutil.copytree(straight.checkpoints / "global_step_8", other.checkpoints / "global_step_8")
    allowed = "runner.resume_allow_changes=['actor.model (base weights)','rollout.model (config and eos)']"
    printed = other.finish(AUTO, "runner.max_steps=8", allowed, expect=2)
    assert "checkpoint of another model" in printed and "model.embed_tokens.weight" in printed
    assert "Traceback" not in printed
