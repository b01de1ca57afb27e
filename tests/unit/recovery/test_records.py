"""Records of a checkpoint that agree with its manifest but hold impossible values: `auto` logs that it skips them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlinf_lite.checkpoint import Checkpointer, DamagedCheckpoint
from rlinf_lite.config import Config
from rlinf_lite.config.compose import load
from rlinf_lite.errors import EXIT_USER_ERROR
from rlinf_lite.recovery.resume import choose_start
from rlinf_lite.runner.failures import explain
from rlinf_lite.runner.progress import Progress

HUB = {"wandb_run_id": None, "last_step": 3}


def counters(**changes: Any) -> dict[str, Any]:
    return {"progress": {**Progress(step=3, cursor=24).state(), **changes}, "observability": HUB}


def hub(**changes: Any) -> dict[str, Any]:
    return {"progress": Progress(step=3).state(), "observability": {**HUB, **changes}}


GOOD = counters()
DATA = {
    "no progress": ({"observability": HUB}, "holds no progress"),
    "no observability": ({"progress": GOOD["progress"]}, "holds no observability"),
    "progress null": ({**GOOD, "progress": None}, "progress is a NoneType"),
    "progress a list": ({**GOOD, "progress": [3]}, "progress is a list"),
    "a counter is missing": ({**GOOD, "progress": {"step": 3}}, "progress holds"),
    "an unknown counter": (counters(extra=1), "progress holds"),
    "cursor negative": (counters(cursor=-1), "progress.cursor=-1"),
    "cursor fractional": (counters(cursor=2.5), "progress.cursor=2.5"),
    "cursor without end": (counters(cursor=10**40), "progress.cursor=1000"),
    "cursor a flag": (counters(cursor=True), "progress.cursor=True"),
    "step a text": (counters(step="3"), "progress.step='3'"),
    "step null": (counters(step=None), "progress.step=None"),
    "another step": (counters(step=4), "says step 4, the manifest 3"),
    "tokens NaN": (counters(num_tokens=math.nan), "progress.num_tokens=nan"),
    "samples as a tensor": (counters(num_samples=torch.tensor(3)), "progress.num_samples=tensor"),
    "best accuracy NaN": (counters(best_val_accuracy=math.nan), "progress.best_val_accuracy=nan"),
    "best accuracy infinite": (counters(best_val_accuracy=math.inf), "progress.best_val_accuracy=inf"),
    "best step to come": (counters(best_val_step=9), "best_val_step=9 is after step 3"),
    "best a list": (counters(best=[1.0]), "progress.best="),
    "best NaN": (counters(best={"loss": math.nan}), "progress.best="),
    "best by number": (counters(best={1: 1.0}), "progress.best="),
    "unlogged of texts": (counters(unlogged={"loss": "1"}), "progress.unlogged="),
    "hub null": ({**GOOD, "observability": None}, "observability=None"),
    "hub empty": ({**GOOD, "observability": {}}, "observability={}"),
    "run id a number": (hub(wandb_run_id=7), "observability.wandb_run_id=7"),
    "run id empty": (hub(wandb_run_id=""), "observability.wandb_run_id=''"),
    "run id endless": (hub(wandb_run_id="x" * 10**5), "observability.wandb_run_id='xxx"),
    "run id of control characters": (hub(wandb_run_id="a\n\x1b[2J"), "observability.wandb_run_id="),
    "last step fractional": (hub(last_step=2.5), "observability.last_step=2.5"),
}
INFO = {
    "identity a text": ({"identity": "all"}, "info.identity='all'"),
    "identity a list": ({"identity": [1]}, "info.identity="),
    "identity null": ({"identity": None}, "info.identity=None"),
    "compute a number": ({"compute": 8}, "info.compute=8"),
    "model path a list": ({"model_path": ["x"]}, "info.model_path="),
    "tied a list": ({"tied": ["x"]}, "info.tied="),
    "tied to a number": ({"tied": {"a": 1}}, "info.tied="),
    "metrics of texts": ({"metrics": {"reward": "high"}}, "info.metrics="),
    "metrics a number": ({"metrics": 1}, "info.metrics=1"),
    "save id a number": ({"save_id": 5}, "info.save_id=5"),
}
CASES = {name: (data, {}, said) for name, (data, said) in DATA.items()} | {
    name: (GOOD, info, said) for name, (info, said) in INFO.items()
}


@pytest.fixture(scope="module")
def config_of():
    """``config_of(resume_dir)``; Hydra composes it once."""
    composed = load([])

    def make(resume_dir: object) -> Config:
        config = composed.model_copy(deep=True)
        config.runner.resume_dir = str(resume_dir)
        return config

    return make


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    state = {"w": torch.zeros(2)}
    data = {"progress": Progress(step=2).state(), "observability": {"wandb_run_id": "abc", "last_step": 2}}
    Checkpointer(tmp_path / "checkpoints").save(2, state, data=data, info={"identity": {}, "compute": "cpu"})
    return tmp_path / "checkpoints"


@pytest.mark.parametrize(("data", "info", "said"), CASES.values(), ids=CASES)
def test_nonsense_is_stepped_over_aloud_and_refused_where_it_is_given(checkpoints, config_of, capsys, data, info, said):
    path = Checkpointer(checkpoints).save(3, {"w": torch.zeros(2)}, data=data, info=info).path
    start = choose_start(config_of("auto").runner, checkpoints)
    assert start.progress == Progress(step=2) and set(start.selection.damaged) == {path}
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("!!")]
    assert "stepped over a damaged checkpoint" in line and said in line and str(path) in line
    with pytest.raises(DamagedCheckpoint) as caught:
        choose_start(config_of(path).runner, checkpoints)
    message, code = explain(caught.value)
    assert code == EXIT_USER_ERROR and said in str(message)


def test_what_a_run_writes_is_taken(checkpoints, config_of):
    progress = Progress(
        step=3,
        cursor=2**40,
        best_val_accuracy=0.5,
        best_val_step=3,
        best={"loss": -math.inf},
        unlogged={"loss": math.nan, "tokens": 7},
    )
    data = {"progress": progress.state(), "observability": {"wandb_run_id": None, "last_step": -1}}
    info = {"identity": {"a": [1, None]}, "compute": "cpu", "tied": {"a": "b"}, "metrics": {"x": 1, "y": 0.5}}
    Checkpointer(checkpoints).save(3, {"w": torch.zeros(2)}, data=data, info=info)
    taken = choose_start(config_of("auto").runner, checkpoints).progress
    assert taken.step == 3 and taken.best == progress.best and math.isnan(taken.unlogged["loss"])
