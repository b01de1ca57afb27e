"""What users write on the command line and in YAML: paths, text, lists, and what Hydra cannot read."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from rlinf_lite import faults, paths
from rlinf_lite.checkpoint import Checkpointer, CheckpointManager, NoCheckpoint
from rlinf_lite.checkpoint.storage import storage_path
from rlinf_lite.config import ConfigError, build, flatten, keys
from rlinf_lite.config.compose import load
from rlinf_lite.config.overrides import readable
from rlinf_lite.config.rules import check
from rlinf_lite.config.schema import is_list, is_text
from rlinf_lite.eval.__main__ import parse as parse_eval
from rlinf_lite.eval.settings import overrides as eval_overrides
from rlinf_lite.eval.source import opened
from rlinf_lite.models.hf_directory import resolve
from rlinf_lite.report.__main__ import parser as report_parser

START = {"runner": {"experiment_name": "x"}, "actor": {"model": {"model_path": "m"}}, "data": {"type": "arithmetic"}}
PATH_KEYS = {
    "runner.output_dir",
    "runner.logger.log_path",
    "runner.checkpoint.root",
    "runner.resume_dir",
    "actor.model.model_path",
    "actor.tokenizer.tokenizer_model",
    "rollout.model.model_path",
    "critic.model.model_path",
    "data.train_data_paths",
    "data.val_data_paths",
    "algorithm.path",
    "reward.path",
}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def built_together(values: dict[str, object]) -> dict[str, object]:
    raw = OmegaConf.create(START)
    for key, value in values.items():
        OmegaConf.update(raw, key, value)
    found = flatten(build(raw))
    return {key: found[key] for key in values}


def built(key: str, value: object):
    return built_together({key: value})[key]


def read(override: str):
    """The value that Hydra takes an override for."""
    (prepared,) = readable([override], lambda key: False)
    assert prepared.startswith("++")
    return OverridesParser.create().parse_override(prepared).value()


def loaded(key: str, text: str):
    return built(key, read(f"{key}={text}"))


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(list(arguments))
    return str(caught.value)


def unreadable(override: str) -> str:
    with pytest.raises(ConfigError) as caught:
        readable([override], lambda key: False)
    return str(caught.value)


# -- paths


def test_every_key_that_looks_like_a_path_is_one():
    looks = {key for key in keys() if key.endswith(("path", "paths", "dir", "root", "tokenizer_model"))}
    assert looks == PATH_KEYS


@pytest.mark.parametrize("written", ["{key}=~/{key}", '{key}="~/{key}"'])
def test_a_tilde_is_the_home_directory(home, written):
    expected = {key: [f"{home}/{key}"] if key.startswith("data.") else f"{home}/{key}" for key in PATH_KEYS}
    assert built_together({key: read(written.format(key=key)) for key in PATH_KEYS}) == expected
    assert built_together({key: f"~/{key}" for key in PATH_KEYS}) == expected


def test_what_is_made_of_a_path_follows_it(home):
    config = load(["runner.output_dir=~/logs", "actor.model.model_path=~/m"])
    assert config.runner.logger.log_path == f"{home}/logs/grpo-tiny-arithmetic"
    assert config.rollout.model.model_path == config.actor.tokenizer.tokenizer_model == f"{home}/m"


@pytest.mark.parametrize(
    "path", ["hf:openai/gsm8k:main:train[:100]", "embedded:tiny-arithmetic", "s3://b/~/x", "a/~/b", "./~", "auto", "a~"]
)
def test_other_names_stay_as_they_are(home, path):
    assert paths.expand(path) == path


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("~nobody-of-this-name/x", "there is no home directory ~nobody-of-this-name"),
        ("$HOME/logs", "write ${oc.env:HOME}"),
        ("", "is empty"),
        ("  ", "is empty"),
        ("a\0b", "null byte"),
    ],
)
def test_what_is_no_path_is_refused_wherever_it_is_read(path, said):
    with pytest.raises(ValueError) as caught:
        paths.expand(path)
    assert said in str(caught.value)
    raw = OmegaConf.create(START)
    for key in PATH_KEYS:
        OmegaConf.update(raw, key, [path] if key.startswith("data.") else path)
    with pytest.raises(ConfigError) as refused:
        build(raw)
    assert {line.partition("=")[0] for line in str(refused.value).splitlines() if said in line} == PATH_KEYS
    with pytest.raises(ConfigError, match="--hf_path"):
        resolve(path, "--hf_path")
    with pytest.raises(ValueError):
        storage_path(path)
    with pytest.raises(NoCheckpoint), opened(path, "full"):
        pass


def test_commands_and_libraries_read_paths_likewise(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_eval(["m", "--output", "~/rows.jsonl"]).output == home / "rows.jsonl"
    report = report_parser().parse_args(["~/run", "--output", "~/out", "--compare", "~/other"])
    assert (report.run, report.output, report.compare) == (home / "run", home / "out", [home / "other"])
    assert storage_path("~/x") == Checkpointer("~/x").root == home / "x"
    assert CheckpointManager("~/y").save_dir == home / "y"
    monkeypatch.setenv(faults.VARIABLE, '[{"phase": "here", "action": "EIO", "mark": "~/mark"}]')
    faults._table.cache_clear()
    with pytest.raises(OSError, match="Input/output"):
        faults.reach("here", step=1)
    faults._table.cache_clear()
    assert (home / "mark").exists() and not (tmp_path / "~").exists()


def test_a_url_of_another_machine_is_no_local_path():
    with pytest.raises(ValueError, match=r"names the machine '~'"):
        storage_path("file://~/x")
    assert storage_path("file:///a%20b") == storage_path("file://localhost/a%20b") == Path("/a b")


def test_a_config_may_lie_in_the_home_directory(home):
    (home / "mine.yaml").write_text("defaults: [grpo-tiny-arithmetic, _self_]\nrunner: {max_steps: 7}\n")
    assert load(["~/mine.yaml"]).runner.max_steps == 7


# -- text stays as it was written


@pytest.mark.parametrize(
    "text", ["1e3", "007", "1_000", "true", "12:30", "nan", "0x1F", "é", "a=b", "~x", "a,b", "x#y"]
)
def test_text_is_what_was_written(text):
    assert read(f"runner.experiment_name={text}") == read(f'runner.experiment_name="{text}"') == text
    assert built("runner.experiment_name", text) == text


def test_the_name_reaches_the_run():
    config = load(["runner.experiment_name=1e3", "runner.output_dir=~/a=b"])
    assert config.runner.experiment_name == config.runner.logger.experiment_name == "1e3"
    assert config.runner.logger.log_path.endswith("/a=b/1e3")


def test_null_is_no_name_but_is_no_resume():
    assert loaded("runner.resume_dir", "null") is None
    assert "runner.experiment_name: takes text, but YAML reads what is there as null" in refusal(
        "runner.experiment_name=null"
    )


def test_yaml_that_is_read_as_something_else_is_refused(tmp_path):
    cases = {
        "runner.experiment_name": ("1e3", "the number 1000.0"),
        "runner.logger.project_name": ("007", "the number 7"),
        "data.prompt_key": ("12:30", "the number 750"),
        "data.answer_key": ("on", "true"),
        "runner.logger.experiment_name": ("~", "null"),
    }
    file = tmp_path / "mine.yaml"

    def write(quote: str) -> None:
        raw = OmegaConf.create({"defaults": ["grpo-tiny-arithmetic", "_self_"]})
        for key in cases:
            OmegaConf.update(raw, key, key)
        text = OmegaConf.to_yaml(raw)
        for key, (written, _) in cases.items():
            assert text.count(f": {key}\n") == 1
            text = text.replace(f": {key}\n", f": {quote}{written}{quote}\n")
        file.write_text(text)

    write("")
    lines = refusal(str(file)).splitlines()
    assert {line.partition(":")[0] for line in lines} == cases.keys()
    for line in lines:
        key = line.partition(":")[0]
        assert f"YAML reads what is there as {cases[key][1]};" in line and f'{key}: "..."' in line
    write("'")
    found = flatten(load([str(file)]))
    assert {key: found[key] for key in cases} == {key: written for key, (written, _) in cases.items()}


def test_every_text_key_keeps_its_text():
    free = [key for key, spec in keys().items() if is_text(spec.kind)]
    assert len(free) > 30
    raw = OmegaConf.create(START)
    for key in free:
        OmegaConf.update(raw, key, 1e3)
    with pytest.raises(ConfigError) as caught:
        build(raw)
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == free
    assert all("the number 1000.0" in line for line in lines)


def test_an_evaluation_keeps_text_too():
    assert eval_overrides(["data.prompt_key=1e3", "data.seed=3"]) == {"data.prompt_key": "1e3", "data.seed": 3}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "names no directory of its own"),
        ("   ", "names no directory of its own"),
        (".", "names no directory of its own"),
        ("..", "names no directory of its own"),
        ("../x", "is a name, not a path; put the directories into runner.output_dir"),
        ("/tmp/x", "is a name, not a path"),
        ("a/b", "is a name, not a path"),
        ("a\nb", "characters that cannot be seen"),
        ("a\x00b", "null byte"),
        ("a ", "begins or ends with a space"),
        ("é" * 128, "256 bytes, a directory's name has at most 255"),
    ],
)
def test_an_experiment_has_a_name_of_its_own(name, said):
    raw = OmegaConf.create(START)
    raw.runner.experiment_name = name
    with pytest.raises(ConfigError) as caught:
        check(build(raw))
    assert said in str(caught.value)


# -- lists


def test_one_text_is_a_list_of_one():
    lists = [key for key, spec in keys().items() if spec.kind == list[str]]
    assert len(lists) >= 5
    ones = {key: "wandb" if keys()[key].choices else f"one {key}" for key in lists}
    wanted = {key: [one] for key, one in ones.items()}
    assert built_together(ones) == built_together(wanted) == wanted


def test_lists_without_brackets_on_the_command_line():
    assert load(["runner.logger.logger_backends=wandb"]).runner.logger.logger_backends == ["wandb"]
    assert loaded("runner.logger.logger_backends", "wandb") == ["wandb"]
    assert loaded("runner.logger.logger_backends", "wandb,tensorboard") == ["wandb", "tensorboard"]
    assert loaded("runner.resume_allow_changes", "data (training problems)") == ["data (training problems)"]
    assert loaded("data.train_data_paths", "a=b.jsonl") == ["a=b.jsonl"]
    assert loaded("data.train_data_paths", "[x.jsonl,y.jsonl]") == ["x.jsonl", "y.jsonl"]
    assert loaded("data.train_data_paths", "1e3") == ["1e3"]
    assert loaded("data.train_data_paths", "[]") == []


@pytest.mark.parametrize("value", [None, 3, {"a": 1}])
def test_what_is_no_list_is_told_how_to_write_one(value):
    lists = [key for key, spec in keys().items() if is_list(spec.kind)]
    assert len(lists) >= 6
    with pytest.raises(ConfigError) as caught:
        built_together(dict.fromkeys(lists, value))
    said = str(caught.value).splitlines()
    assert len(said) == len(lists)
    for key in lists:
        assert [line for line in said if line.startswith(key) and f"takes a list; write {key}=[first,second]" in line]


def test_a_list_may_follow_another():
    raw = OmegaConf.create(START)
    OmegaConf.update(raw, "data.train_data_paths", "a.jsonl")
    OmegaConf.update(raw, "data.val_data_paths", "${data.train_data_paths}")
    assert build(raw).data.val_data_paths == ["a.jsonl"]


# -- what Hydra cannot read


@pytest.mark.parametrize(
    "override",
    [
        "cluster.component_placement.actor=a=b",
        "cluster.component_placement.actor=0,1",
        "cluster.component_placement.actor=~x",
        "cluster.component_placement={actor:a=b}",
        "data.train_data_paths=[a=b.jsonl,c.jsonl]",
        "data.train_data_paths=a=b,c",
        "data.metadata_keys=[a#b]",
        "runner.experiment_name='x",
        'runner.experiment_name="x',
        "data.few_shot=[{question: a=b}",
        "data.chat_template_kwargs={a: (b)}",
        "data.reasoning_gym.config.x=choice(a,b)",
    ],
)
def test_how_to_quote_is_shown_and_works(override):
    said = unreadable(override)
    assert override in said and "double quotes, and the whole into single ones for the shell: " in said
    assert "Exception" not in said and len(said.splitlines()) == 1
    (shown,) = shlex.split(said.rpartition("for the shell: ")[2])
    if shown.endswith('="..."'):
        return
    assert "=" in shown and read(shown)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("runner.max_steps=~5", "runner.max_steps=~5: takes a whole number"),
        ("runner.max_steps=1,2", "several values, and a run takes one"),
        ("runner.max_steps=range(1,3)", "several values, and a run takes one"),
        ("actor.optim.lr==1", "actor.optim.lr==1: takes a number"),
        ("data.shuffle=(true)", "data.shuffle=(true): takes true or false"),
        ("runner.max_stepz=~5", "unknown key; did you mean runner.max_steps?"),
        ("=3", "'=3': no key=value"),
        ("runner.max_steps=3\nx", "takes a whole number"),
        ("~nosuch key", "nosuch"),
    ],
)
def test_other_things_that_cannot_be_read(override, said):
    message = unreadable(override)
    assert said in message and "NoViable" not in message and "AnyNode" not in message


def test_a_word_that_is_no_override_is_named():
    assert "'more': no key=value; a config's name is the first argument" in refusal("grpo-tiny-arithmetic", "more")


def test_all_that_cannot_be_read_is_said_at_once():
    assert len(refusal("runner.max_steps=~5", "runner.save_interval=1,2").splitlines()) == 2
