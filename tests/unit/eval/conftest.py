"""Fixtures: runs, checkpoints and exports of the embedded model to evaluate, and the evaluation command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from rlinf_lite.checkpoint import Checkpointer
from rlinf_lite.config import Config, build, flatten, to_yaml
from rlinf_lite.eval.__main__ import main
from rlinf_lite.models.hf_directory import resolve
from rlinf_lite.ties import tied_names
from rlinf_lite.weights.names import named_weights

EMBEDDED = "embedded:tiny-arithmetic"
SETTINGS = {
    "runner": {"experiment_name": "tried", "max_steps": 8, "seq_length": 16},
    "algorithm": {"group_size": 4, "sampling_params": {"max_new_tokens": 4}},
    "rollout": {"max_running_requests": 5},
    "data": {
        "type": "arithmetic",
        "max_prompt_length": 8,
        "rollout_batch_size": 8,
        "arithmetic": {"num_problems": 24, "num_val_problems": 20},
    },
    "actor": {"seed": 77, "model": {"model_path": EMBEDDED}},
    "reward": {"reward_type": "exact"},
}


@pytest.fixture
def settings() -> dict:
    """A run's config, as its YAML has it."""
    return json.loads(json.dumps(SETTINGS))


@pytest.fixture
def trained_model():
    """The embedded model with small random changes."""

    def make(seed: int = 0, scale: float = 0.004):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(resolve(EMBEDDED)).eval()
        with torch.no_grad():
            for param in model.parameters():
                param.add_(torch.randn_like(param) * scale)
        return model

    return make


@pytest.fixture
def make_run(tmp_path, trained_model, settings):
    """``make_run(steps=[2, 4])``: the directory of a run, with its config and checkpoints."""

    def make(steps: list[int], changes: dict | None = None, *, with_yaml: bool = True) -> Path:
        directory = tmp_path / "logs" / "tried"
        config: Config = build(OmegaConf.merge(settings, changes or {}))
        (directory / "checkpoints").mkdir(parents=True)
        if with_yaml:
            (directory / "config.yaml").write_text(to_yaml(config))
        for step in steps:
            model = trained_model(seed=step)
            state = {"model": dict(named_weights(model)), "lr_scheduler": {"num_updates": torch.tensor(step)}}
            info = {
                "tied": tied_names(model),
                "model_path": config.actor.model.model_path,
                "identity": flatten(config, neutral_keys=False) | {"actor.model (base weights)": "..."},
            }
            Checkpointer(directory / "checkpoints").save(step, state, data={}, info=info)
        return directory

    return make


@pytest.fixture
def exported(tmp_path, trained_model):
    """The model of a run's checkpoint of step 4, as a Hugging Face directory."""
    directory = tmp_path / "exported"
    trained_model(seed=4).save_pretrained(directory)
    for file in resolve(EMBEDDED).glob("tokenizer*"):
        shutil.copyfile(file, directory / file.name)
    return directory


@pytest.fixture
def command(capsys):
    """``command("MODEL", "--json")``: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def results(command):
    """The results of a command that must succeed."""

    def run(*arguments: object) -> dict:
        code, out, err = command(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return run
