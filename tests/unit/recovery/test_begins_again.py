"""A run that begins again after its state was lost begins as a new run does, with nothing of what failed to load.

A real `PolicyWorker` in this process takes the place of the trainers; checkpoints and replicas are its own.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from rlinf_lite.checkpoint import DamagedCheckpoint, LoadReport, RankSilent, flatten, state_digest
from rlinf_lite.cluster.workers.policy_worker import PolicyWorker
from rlinf_lite.cluster.workers.records import RankLayout, TrainerSetup
from rlinf_lite.config import Config
from rlinf_lite.config.compose import load
from rlinf_lite.observability import MetricHub
from rlinf_lite.recovery.build import Build
from rlinf_lite.recovery.resume import choose_start
from rlinf_lite.runner.progress import Progress

IDENTITY = {"lr": 1.0}


class OneActor:
    """The trainers, and the part of the workers that sets them up."""

    layout = RankLayout(sizes={"actor": 1})

    def __init__(self, config: Any) -> None:
        self.worker = PolicyWorker(
            0, 1, config.actor, config.algorithm, config.runner.checkpoint, config.cluster, "cpu", search=[]
        )
        self.session = SimpleNamespace(watch=SimpleNamespace(starting=lambda seconds: nullcontext()))

    @property
    def trainers(self) -> OneActor:
        return self

    def load(self, path: str, verify: str) -> LoadReport:
        return self.worker.load(path, verify)

    def load_weights(self, path: str, verify: str) -> LoadReport:
        return self.worker.load_weights(path, verify)

    def set_up(self, checkpoints: str, total_updates: int) -> tuple[TrainerSetup, str]:
        return self.worker.setup(self.worker.open_store(1), self.layout, checkpoints, total_updates), "cpu"

    def reset_trainers(self) -> None:
        self.worker.reset()

    def train(self, step: int) -> None:
        """Every tensor, the counter and the RNG state are others afterwards."""
        trainer = self.worker.trainer
        for param in trainer.model.parameters():
            param.grad = torch.ones_like(param)
        torch.rand(3)
        trainer.optim_step(0.01)
        self.worker.step = step

    def whole_state(self) -> str:
        rng = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
        return f"{state_digest(flatten(self.worker.trainer.state()))} {rng}"


class Replica:
    """The newest state in memory; as `MemoryReplicas`, without Ray."""

    def __init__(self, actor: OneActor, data: dict, flip: bool) -> None:
        self.actor, self.step = actor, 2
        small, shard = actor.worker.replicate(2, {"compute": "cpu"})
        (name, content) = next(iter(shard.items()))
        content = content.copy()
        content[len(content) // 2] ^= flip
        self.files = small, {name: content}

    def restore(self) -> None:
        with pytest.raises(DamagedCheckpoint):
            self.actor.worker.load_replica(2, *self.files)


@pytest.fixture
def actor() -> Iterator[OneActor]:
    made = OneActor(composed())
    yield made
    made.worker.reset()
    assert not dist.is_initialized()


@functools.cache
def composed() -> Config:
    return load(["runner.logger.logger_backends=[]"])


def build(root: Path, actor: OneActor, **runner: str) -> Build:
    config = composed().model_copy(deep=True)
    for name, value in {"output_dir": str(root), **runner}.items():
        setattr(config.runner, name, value)
    checkpoints = root / "checkpoints"
    prepared = SimpleNamespace(
        start=choose_start(config.runner, checkpoints), identity=IDENTITY, last_step=9, total_updates=100
    )
    made = Build(
        config=config, prepared=prepared, checkpoints=checkpoints, log=root, stop=None, request=None, started=0.0
    )
    made._compute = "cpu"
    return made


def data_of(step: int) -> dict:
    return {"progress": Progress(step=step).state(), "observability": {"wandb_run_id": None, "last_step": step}}


def lose_everything(root: Path, actor: OneActor, lost: str, **runner_keys: str) -> tuple[str, str, int]:
    """Two steps, and then a restart that finds only what is damaged.

    Returns:
        The whole state when the run began, when it began again, and the step that it resumes after.
    """
    made = build(root, actor, **runner_keys)
    made.bring_up(actor)
    made._restore_from(made.prepared.start, actor)
    began = actor.whole_state()
    for step in (1, 2):
        actor.train(step)
    replicas = Replica(actor, data_of(2), flip=True) if lost == "replica" else None
    if lost != "replica":
        actor.worker.save(2, data_of(2), {"identity": IDENTITY, "compute": "cpu"})
        (shard,) = (root / "checkpoints" / "global_step_2" / "actor").glob("*.distcp")
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    actor.train(3)
    actor.reset_trainers()
    saver = SimpleNamespace(went_back=lambda *saved: None, info={})
    runner = SimpleNamespace(
        progress=Progress(step=2), replicas=replicas, saver=saver, hub=MetricHub([], committed_step=None), samples=None
    )
    made.bring_up_again(actor, runner)
    with ExitStack() as sinks:
        made.restore(runner, actor, sinks)
    return began, actor.whole_state(), runner.progress.step


@pytest.mark.parametrize("lost", ["replica", "checkpoint"])
def test_a_new_run_begins_again_as_it_began(tmp_path, actor, lost, capsys):
    began, again, step = lose_everything(tmp_path, actor, lost)
    assert (again, step) == (began, 0)
    assert "the run begins again" in capsys.readouterr().out


def test_a_rank_that_dies_in_a_load_is_no_fault_of_the_checkpoint(tmp_path, actor, monkeypatch):
    """It is tried again with that rank replaced; neither set aside nor stepped over."""
    made = build(tmp_path, actor)
    made.bring_up(actor)
    actor.train(1)
    actor.worker.save(1, data_of(1), {"identity": IDENTITY, "compute": "cpu"})
    monkeypatch.setattr(actor.worker, "load", Mock(side_effect=RankSilent("rank 1 did not answer")))
    runner = SimpleNamespace(progress=Progress(step=1), replicas=None)
    with ExitStack() as sinks, pytest.raises(RankSilent, match="rank 1 did not answer"):
        made.restore(runner, actor, sinks)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["global_step_1"]


@pytest.mark.parametrize("lost", ["replica", "checkpoint"])
def test_with_the_weights_of_a_checkpoint(tmp_path, actor, lost):
    source = build(tmp_path / "source", actor)
    source.bring_up(actor)
    actor.train(1)
    actor.worker.save(1, data_of(1), {"identity": IDENTITY, "compute": "cpu"})
    base = actor.whole_state()
    actor.reset_trainers()
    given = str(tmp_path / "source" / "checkpoints" / "global_step_1")
    began, again, step = lose_everything(tmp_path / "run", actor, lost, resume_dir=given, resume_mode="weights")
    assert (again, step) == (began, 0)
    assert base != began


def test_from_the_checkpoint_of_another_run(tmp_path, actor):
    source = build(tmp_path / "source", actor)
    source.bring_up(actor)
    actor.train(1)
    actor.worker.save(1, data_of(1), {"identity": IDENTITY, "compute": "cpu"})
    saved = actor.whole_state()
    actor.reset_trainers()
    given = str(tmp_path / "source" / "checkpoints" / "global_step_1")
    began, again, step = lose_everything(tmp_path / "run", actor, "checkpoint", resume_dir=given)
    assert (again, step) == (began, 1) and began == saved
