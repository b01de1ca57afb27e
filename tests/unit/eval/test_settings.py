"""Which settings an evaluation has: the run's, then the user's; and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlinf_lite.errors import ConfigError
from rlinf_lite.eval.settings import configure, identity, overrides
from rlinf_lite.eval.source import opened


@pytest.fixture
def configured():
    def make(model, given=None, **options):
        with opened(str(model), "size") as source:
            return configure(source, given or {}, **options)

    return make


def test_a_checkpoint_is_evaluated_as_its_run_validates(make_run, configured):
    config = configured(make_run([2]) / "checkpoints" / "global_step_2")
    assert (config.data.type, config.data.arithmetic.num_val_problems, config.data.rollout_batch_size) == (
        "arithmetic",
        20,
        8,
    )
    assert (config.rollout.max_running_requests, config.actor.seed, config.reward.reward_type) == (5, 77, "exact")
    assert config.algorithm.val_sampling_params.max_new_tokens == 4
    assert config.actor.model.model_path == "embedded:tiny-arithmetic"


def test_without_the_runs_yaml_the_manifest_is_enough(make_run, configured):
    config = configured(make_run([2], with_yaml=False))
    assert (config.data.arithmetic.num_val_problems, config.rollout.max_running_requests) == (20, 5)
    assert config.actor.tokenizer.tokenizer_model == "embedded:tiny-arithmetic"


def test_what_the_manifest_says_counts_more_than_the_yaml(make_run, configured):
    run = make_run([2])
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("max_running_requests: 5", "max_running_requests: 6"))
    assert configured(run).rollout.max_running_requests == 5


def test_paths_come_from_the_newest_yaml_before_the_checkpoint(make_run, configured):
    run = make_run([2, 4], {"data": {"type": "math", "val_data_paths": ["old.jsonl"]}})
    text = (run / "config.yaml").read_text()
    (run / "config.from_step_2.yaml").write_text(text.replace("old.jsonl", "new.jsonl"))
    paths = {step: configured(run / "checkpoints" / f"global_step_{step}").data.val_data_paths for step in (2, 4)}
    assert paths == {2: ["old.jsonl"], 4: ["new.jsonl"]}


def test_a_directory_is_evaluated_as_a_run_validates(make_run, exported, configured):
    run = make_run([2])
    config = configured(exported, of_run=str(run))
    assert (config.data.arithmetic.num_val_problems, config.actor.seed) == (20, 77)
    for path in (
        config.actor.model.model_path,
        config.rollout.model.model_path,
        config.actor.tokenizer.tokenizer_model,
    ):
        assert path == str(exported)
    assert configured(exported, of_run=str(run / "config.yaml")) == config
    assert configured(exported, of_run=str(run / "checkpoints" / "global_step_2")) == config


def test_another_base_model_is_followed_by_engine_and_tokenizer(make_run, exported, configured):
    config = configured(make_run([2]), {"actor.model.model_path": str(exported)})
    assert config.rollout.model.model_path == config.actor.tokenizer.tokenizer_model == str(exported)


def test_a_directory_by_itself(exported, configured):
    with pytest.raises(ConfigError, match=r"nothing to evaluate: .*exported comes with no validation data; .*--data"):
        configured(exported)
    config = configured(exported, {"data.val_data_paths": ["a.jsonl"], "rollout.max_running_requests": 200})
    assert (config.data.val_rollout_batch_size, config.rollout.model.precision) == (200, "fp32")


def test_a_directory_is_computed_as_it_is_stored(exported, configured):
    file = exported / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": "bfloat16"}))
    assert configured(exported, {"data.type": "arithmetic"}).rollout.model.precision == "bf16"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.promt_key", "q", "data.promt_key: unknown key; did you mean data.prompt_key?"),
        ("actor.optim.lr", 1.0, "actor.optim.lr: plays no part in an evaluation"),
        (
            "algorithm.sampling_params.temperature",
            0.5,
            "algorithm.sampling_params.temperature: plays no part in an evaluation; "
            "algorithm.val_sampling_params.temperature does",
        ),
        ("rollout.max_running_requests", "many", "rollout.max_running_requests=many: takes a whole number"),
        ("rollout.max_running_requests", 0, "rollout.max_running_requests=0: must be at least 1"),
        ("algorithm.val_sampling_params.top_p", 1.5, "algorithm.val_sampling_params.top_p=1.5: must be"),
    ],
)
def test_what_cannot_be_is_refused_by_name(configured, key, value, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        configured("embedded:tiny-arithmetic", {key: value})


def test_a_yaml_to_be_composed_is_refused(configured):
    shipped = Path(__file__).parents[3] / "configs" / "grpo-tiny-arithmetic.yaml"
    with pytest.raises(ConfigError, match=r"to be composed with others; give the config\.yaml that a run wrote"):
        configured("embedded:tiny-arithmetic", of_run=str(shipped))


def test_overrides_are_read_as_yaml():
    words = ["data.val_data_paths=[a.jsonl,b=c.jsonl]", "actor.seed=3", "data.prompt_key=q", "data.shuffle=false"]
    assert overrides(words) == {
        "data.val_data_paths": ["a.jsonl", "b=c.jsonl"],
        "actor.seed": 3,
        "data.prompt_key": "q",
        "data.shuffle": False,
    }
    with pytest.raises(ConfigError, match=r"'greedy': neither an option nor key=value"):
        overrides(["greedy"])


def test_identity_knows_what_makes_the_numbers(configured):
    def made(**given):
        config = configured("embedded:tiny-arithmetic", {key.replace("__", "."): v for key, v in given.items()})
        return identity(config, device="cpu", num_samples=1, fingerprints={"MODEL (weights)": "w"})

    base = made()
    assert json.loads(json.dumps(base)) == base
    for given in ({"actor__seed": 2}, {"rollout__max_running_requests": 3}, {"reward__reward_type": "math"}):
        assert made(**given) != base
    assert made(data__num_workers=2) == base
    assert base["versions.sympy"] and "versions.vllm" not in base


def test_what_belongs_to_the_runs_engine_or_data_goes_with_them(make_run, configured):
    run = make_run([2], {"rollout": {"rollout_backend": "vllm", "tensor_parallel_size": 2, "enforce_eager": True}})
    assert configured(run).rollout.tensor_parallel_size == 2
    config = configured(run, {"rollout.rollout_backend": "builtin"})
    assert (config.rollout.tensor_parallel_size, config.rollout.enforce_eager) == (1, None)
    assert config.rollout.max_running_requests == 5


def test_sums_instead_of_the_runs_files(make_run, configured):
    run = make_run([2], {"data": {"type": "math", "val_data_paths": ["a.jsonl"]}})
    assert configured(run, {"data.type": "arithmetic"}).data.val_data_paths == []


def test_a_key_inside_of_a_table(configured):
    given = {"data.apply_chat_template": True, "data.chat_template_kwargs.enable_thinking": False}
    config = configured("embedded:tiny-arithmetic", {**given, "data.type": "math", "data.val_data_paths": ["a.jsonl"]})
    assert config.data.chat_template_kwargs == {"enable_thinking": False}
