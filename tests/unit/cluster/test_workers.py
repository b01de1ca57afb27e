"""The border to the worker processes: typed classes on the driver's side, and nothing else calls a method by name."""

from __future__ import annotations

import ast
import inspect
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_ray import FakeSession

from rlinf_lite.cluster import workers
from rlinf_lite.cluster.group import Call, WorkerGroup, wait_all
from rlinf_lite.cluster.spares import Spares
from rlinf_lite.cluster.workers.critic import CriticWorkers
from rlinf_lite.cluster.workers.critic_worker import CriticWorker
from rlinf_lite.cluster.workers.policy import PolicyWorkers
from rlinf_lite.cluster.workers.policy_worker import PolicyWorker
from rlinf_lite.cluster.workers.reward import RewardWorkers
from rlinf_lite.cluster.workers.reward_worker import RewardWorker
from rlinf_lite.cluster.workers.rollout import RolloutWorkers
from rlinf_lite.cluster.workers.rollout_worker import RolloutWorker
from rlinf_lite.cluster.workers.trainer import Trainers
from rlinf_lite.cluster.workers.trainer_worker import TrainerWorker
from rlinf_lite.config import ConfigError
from rlinf_lite.config.compose import load
from rlinf_lite.recovery.workers import start_workers
from rlinf_lite.training.ranks import data_parallel_size
from rlinf_lite.types import MiniBatch, Normalizers, RankBatch, Segments, TokenBatch
from rlinf_lite.user_code import search_path

ROOMS = Path(workers.__file__).parents[2]
PAIRS = [
    (PolicyWorkers, PolicyWorker),
    (CriticWorkers, CriticWorker),
    (Trainers, TrainerWorker),
    (RolloutWorkers, RolloutWorker),
    (RewardWorkers, RewardWorker),
]
BY_NAME = {"call": 0, "_call": 0, "start": 0, "start_each": 0, "start_in_two": 0, "start_one": 1, "run": 0}
"""Methods of `WorkerGroup`, `Trainers` and `WorkerHandle` that take a method's name, and at which place."""


def calls_by_name(tree: ast.AST) -> list[tuple[str, ast.Call, str]]:
    """(method of the group, call, remote method) for every call of a remote method by its name."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in BY_NAME:
            place = BY_NAME[node.func.attr]
            if len(node.args) > place and isinstance(node.args[place], ast.Constant):
                found.append((node.func.attr, node, node.args[place].value))
    return found


def test_only_the_workers_are_called_by_name():
    for file in ROOMS.rglob("*.py"):
        inside, text = file.parent.name == "workers" or file.name == "group.py", file.read_text()
        if not inside and "rlinf_lite.cluster" in text:
            assert not calls_by_name(ast.parse(text)), file


@pytest.mark.parametrize(("face", "worker"), PAIRS)
def test_what_is_called_by_name_is_there_and_takes_the_arguments(face, worker):
    tree = ast.parse(Path(inspect.getfile(face)).read_text())
    called = calls_by_name(tree)
    assert called
    for how, call, name in called:
        signature = inspect.signature(getattr(worker, name))
        given = call.args[BY_NAME[how] + 1 :]
        if how != "start_each" and not any(isinstance(arg, ast.Starred) for arg in given):
            signature.bind(None, *given)  # raises TypeError if they do not fit


def test_results_have_the_types_that_the_driver_is_promised():
    for name in ("setup", "save", "start_save", "poll_save", "finish_save"):
        assert _returns(Trainers, name) == list[_returns(TrainerWorker, name)], name
    for name in ("load", "load_weights"):
        assert _returns(Trainers, name) == _returns(TrainerWorker, name), name
    for workers_of, worker in ((PolicyWorkers, PolicyWorker), (CriticWorkers, CriticWorker)):
        for name in ("forward", "update"):
            assert _returns(workers_of, f"start_{name}") == list[Call[_returns(worker, name)]], name


def _returns(kind: type, method: str) -> object:
    from rlinf_lite.checkpoint import LoadReport, SaveError, SaveReport
    from rlinf_lite.training.update import UpdateReport

    names = {"LoadReport": LoadReport, "SaveError": SaveError, "SaveReport": SaveReport, "Tensor": torch.Tensor}
    names |= {"UpdateReport": UpdateReport}
    function = getattr(kind, method)
    annotation = function.__annotations__["return"]
    return eval(annotation, {**vars(typing), **function.__globals__, **names})


def test_a_worker_is_started_with_the_sections_that_it_uses(fake_ray, tmp_path):
    config, started = load(["critic.use_critic_model=true", "algorithm.adv_type=gae"]), []

    def build(target: str, *args: object) -> SimpleNamespace:
        (worker,) = (worker for _, worker in PAIRS if target.endswith(f":{worker.__name__}"))
        started.append(inspect.signature(worker).bind(*args).arguments)
        return SimpleNamespace(setup=lambda *args: inspect.signature(worker.setup).bind(None, *args).arguments)

    session = FakeSession(build)
    workers_of_run = start_workers(config, session, tmp_path / "workers.json")
    of_actor, of_critic, of_rollout, of_reward = (started[index] for index in (0, 2, 3, 5))
    own = {"num_ranks": 2, "cluster": session.config, "device": "cpu"}
    assert of_actor == {
        **own,
        **{"rank": 0, "config": config.actor, "algorithm": config.algorithm, "checkpoint": config.runner.checkpoint},
        "search": search_path(),
    }
    assert of_critic == {
        **of_actor,
        **{"num_ranks": 1, "config": config.critic, "seed": config.actor.seed},
    }
    assert of_rollout == {**own, "rank": 0, "config": config.rollout, "tokenizer": config.actor.tokenizer}
    assert (of_reward["rank"], of_reward["config"]) == (0, config.reward)
    (asked,) = wait_all([workers_of_run.rollouts.start_setup(1)])
    assert (asked["sampling"], asked["seq_length"]) == (config.algorithm.sampling_params, config.runner.seq_length)


# -- each rank is sent its own units


def unit(index: int) -> TokenBatch:
    none = torch.zeros(0, dtype=torch.int64)
    return TokenBatch(
        index=index,
        ids_N=none,
        positions_N=none,
        segments=Segments(start_S=none, stop_S=none, parent_S=none),
        source_M=none,
        targets_M=none,
        seq_M=none,
        num_responses=0,
    )


class Rank:
    """Keeps what it was sent."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.sent: list = []

    def update(self, step: int, batch: RankBatch, last: bool) -> SimpleNamespace:
        self.sent.append((step, batch, last))
        return SimpleNamespace(step=step)

    def forward(self, units: tuple, *reference: bool) -> dict[int, str]:
        self.sent.append(units)
        return {unit.index: " ".join(map(str, (unit.index, *reference))) for unit in units if unit is not None}


def group_of(
    kind: type[PolicyWorkers | CriticWorkers], num_ranks: int, tensor_parallel: int = 1
) -> tuple[Any, FakeSession]:
    slots = tuple(range(num_ranks))
    session = FakeSession(lambda target, *args: Rank(*args), slots=slots, critic_slots=slots, nodes=("a",) * num_ranks)
    group, component = object.__new__(kind), {PolicyWorkers: "actor", CriticWorkers: "critic"}[kind]
    group._virtual_ranks, group._tensor_parallel = 5040, tensor_parallel
    WorkerGroup.__init__(group, component, component, "", session, Spares(session))
    return group, session


TRAINED = pytest.mark.parametrize("kind", [PolicyWorkers, CriticWorkers])


@TRAINED
@pytest.mark.parametrize(
    ("num_units", "expected"),
    [(5, [[0, 2, 4], [1, 3, None]]), (4, [[0, 2], [1, 3]]), (1, [[0], [None]]), (0, [[], []])],
)
def test_each_rank_is_sent_its_own_units_only(fake_ray, kind, num_units, expected):
    group, session = group_of(kind, 2)
    norm = Normalizers(num_tokens=7, num_sequences=3)
    batch = MiniBatch(units=tuple(unit(index) for index in range(num_units)), norm=norm)
    assert len(wait_all(group.start_update(6, batch, last=True))) == 2
    for actor, indices in zip(session.actors, expected, strict=True):
        ((step, sent, last),) = actor.worker.sent
        assert [None if one is None else one.index for one in sent.units] == indices
        assert (step, last, sent.norm) == (6, True, norm), "normalizers of the whole"


def test_a_part_of_a_tensor_parallel_group_is_refused():
    with pytest.raises(ConfigError, match=r"tensor_model_parallel_size=2: must divide .* which is 3; change it"):
        data_parallel_size(3, 2)


def test_ranks_of_a_tensor_parallel_group_are_sent_the_same_units(fake_ray):
    group, session = group_of(PolicyWorkers, 4, tensor_parallel=2)
    batch = MiniBatch(units=tuple(unit(index) for index in range(3)), norm=Normalizers(num_tokens=1, num_sequences=1))
    wait_all(group.start_update(6, batch, last=True))
    found = wait_all(group.start_forward(batch.units, reference=True))
    assert found == [{0: "0 True", 2: "2 True"}] * 2 + [{1: "1 True"}] * 2
    for actor, indices in zip(session.actors, [[0, 2]] * 2 + [[1, None]] * 2, strict=True):
        (_, sent, _), _ = actor.worker.sent
        assert [None if one is None else one.index for one in sent.units] == indices


@pytest.mark.parametrize(
    ("kind", "given", "said"), [(PolicyWorkers, {"reference": True}, " True"), (CriticWorkers, {}, "")]
)
def test_each_rank_returns_what_belongs_to_its_own_units(fake_ray, kind, given, said):
    group, session = group_of(kind, 3)
    found = wait_all(group.start_forward([unit(index) for index in range(4)], **given))
    assert found == [{index: f"{index}{said}" for index in of_rank} for of_rank in ((0, 3), (1,), (2,))]
    assert [len(actor.worker.sent[0]) for actor in session.actors] == [2, 2, 2], "as many collectives on every rank"
