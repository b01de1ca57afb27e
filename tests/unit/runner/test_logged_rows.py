"""What wandb and TensorBoard show after every kind of resume is what ``metrics.jsonl`` holds.

Real checkpoints, real sinks (wandb offline, its files read back); only the ranks' part is played by hand.
"""

from __future__ import annotations

import functools
import json
import re
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlinf_lite.checkpoint import Checkpointer, LoadReport, layout
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.cluster.workers.records import RankLayout
from rlinf_lite.config import Config, ConfigError, flatten
from rlinf_lite.config.compose import load
from rlinf_lite.observability import MetricHub, read_jsonl_rows
from rlinf_lite.observability.wandb_file import read_records
from rlinf_lite.observability.wandb_rows import SentRows
from rlinf_lite.observability.wandb_state import read_state
from rlinf_lite.recovery.build import Build, open_sinks
from rlinf_lite.recovery.resume import check_identity, choose_start, recipe, restore, set_newer_aside
from rlinf_lite.runner.progress import Progress

pytest.importorskip("wandb")


@dataclass
class Ranks:
    """Takes the place of `Trainers`."""

    size: int

    @property
    def layout(self) -> RankLayout:
        return RankLayout(sizes={"actor": self.size})

    def load(self, path: str, verify: str) -> LoadReport:
        manifest = manifests.read(Path(path))
        manifest = replace(manifest, world_size=manifest.info["ranks"])
        restored = manifest.world_size == self.size
        return LoadReport(path=Path(path), manifest=manifest, load_seconds=0.1, rng_restored=restored, num_bytes=1)


@functools.cache
def composed(overrides: tuple[str, ...]) -> Config:
    """A config without its directories: Hydra composes it once for all tests."""
    given = ("runner.experiment_name=toy", "runner.logger.logger_backends=[wandb,tensorboard]")
    return load([*given, *overrides])


@dataclass
class Toy:
    """A run whose rows follow from the step, the learning rate and, if it is not ``exact``, from how many ranks there
    were since when."""

    root: Path
    exact: bool = True
    checkpoints: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.root / "toy"
        self.checkpoints = self.log / "checkpoints"

    def config(self, resume: str | None, *overrides: str) -> Config:
        if resume is not None and resume.isdigit():
            resume = str(self.checkpoints / f"global_step_{resume}")
        config = composed(overrides).model_copy(deep=True)
        config.runner.output_dir = str(self.root)
        config.runner.logger.log_path = str(self.log)
        config.runner.resume_dir = resume
        return config

    def identity(self, config: Config) -> dict[str, Any]:
        backend = "fsdp" if self.exact else "one that sums in the order of the ranks"
        return flatten(config, neutral_keys=False) | {"actor.training_backend": backend}

    def run(self, resume: str | None, until: int, *overrides: str, ranks: int = 1, drift: float = 0.0) -> str:
        """Train, save at even steps; the id of the wandb run.

        Args:
            drift: added to every loss: a computation that is not deterministic.
        """
        config = self.config(resume, *overrides)
        now = self.identity(config)
        start = check_identity(choose_start(config.runner, self.checkpoints), now, config.runner.resume_allow_changes)
        start = restore(start, Ranks(ranks), config.runner, self.checkpoints, now, "cpu")
        set_newer_aside(start, self.checkpoints)
        self.let_time_pass()
        with ExitStack() as sinks:
            hub, _ = open_sinks(config, self.log, start, until, sinks, made_with=recipe(now, {"actor": ranks}, "cpu"))
            self.train(config, hub, start.progress.step, until, ranks, drift)
        return self.check(hub) if "wandb" in config.runner.logger.logger_backends else ""

    def let_time_pass(self) -> None:
        """As if the event files were older: otherwise each start waits until the next second."""
        for path in self.log.rglob("events.out.tfevents.*"):
            head, second, tail = re.split(r"(?<=tfevents\.)(\d+)", path.name)
            path.rename(path.with_name(f"{head}{int(second) - 10}{tail}"))

    def train(self, config: Config, hub: MetricHub, first: int, until: int, ranks: int, drift: float = 0.0) -> None:
        before = layout.step_dir(self.checkpoints, first)
        trace = list(manifests.read(before).info["trace"]) if before.exists() else [0.0] * first
        for step in range(first + 1, until + 1):
            lr = config.actor.optim.lr
            trace.append((lr if self.exact else lr / ranks) + drift)
            hub.log(step, {"loss/policy": sum(trace), "optim/lr": lr, "time/step": torch.rand(()).item()})
            if step % 2 == 0:
                data = {"progress": Progress(step=step, cursor=step).state(), "observability": hub.state()}
                info = {"identity": self.identity(config), "compute": "cpu", "ranks": ranks, "trace": trace}
                Checkpointer(self.checkpoints).save(step, {"w": torch.ones(1)}, data=data, info=info)

    def wandb(self, run_id: str) -> tuple[dict[int, dict], dict, list]:
        """Rows by step, config, and (notes, tags, group) of a run, over all of its sessions."""
        from wandb.proto.wandb_internal_pb2 import Record

        rows, config, about = {}, {}, []
        for path in sorted((self.log / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")):
            for record in map(Record.FromString, read_records(path)):
                if record.WhichOneof("record_type") == "history":
                    row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                    assert row["step"] not in rows, "a step came twice"
                    rows[row["step"]] = row
                if record.WhichOneof("record_type") == "run":
                    config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
                    about.append((record.run.notes, list(record.run.tags), record.run.run_group))
        return rows, config, about

    def check(self, hub: MetricHub) -> str:
        """No sink shows a row that ``metrics.jsonl`` does not hold; the id of the wandb run."""
        run_id = hub.state()["wandb_run_id"]
        assert run_id is not None and read_state(self.log).run_id == run_id
        rows = list(read_jsonl_rows(self.log / "metrics.jsonl"))
        assert [row["step"] for row in rows] == list(range(rows[0]["step"], rows[-1]["step"] + 1))
        shown, _, _ = self.wandb(run_id)
        for row in rows:
            same = {key: value for key, value in row.items() if key != "time/step"}
            assert {key: shown[row["step"]][key] for key in same} == same
        board = EventAccumulator(str(self.log / "tensorboard"), size_guidance={"scalars": 0})
        board.Reload()
        expected = [(row["step"], pytest.approx(row["loss/policy"], rel=1e-6)) for row in rows]
        assert [(event.step, event.value) for event in board.Scalars("loss/policy")] == expected
        return run_id


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Toy:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB__SAVE_REQUIREMENTS", "false")  # the list of packages takes wandb longest
    return Toy(tmp_path)


LR = ("actor.optim.lr=0.5", "runner.resume_allow_changes=[actor.optim.lr]")


def test_equal_rows_continue_the_same_run(toy, capsys):
    first = toy.run(None, 8)
    assert toy.run("4", 8) == first, "a rollback without a change"
    assert toy.run("auto", 10) == first
    assert toy.run("10", 12, *LR) == first, "no row is replaced"
    shown, config, about = toy.wandb(first)
    assert sorted(shown) == list(range(1, 13))
    assert config["changed_after_step_10"] == [f"actor.optim.lr: {load([]).actor.optim.lr} -> 0.5"]
    assert {group for _, _, group in about} == {"toy"}
    assert "branches off" not in capsys.readouterr().out


def test_a_rollback_with_a_change_is_a_branch_that_says_where_it_came_from(toy, capsys):
    first = toy.run(None, 8)
    branch = toy.run("2", 8, *LR)
    assert branch != first
    reason = f"actor.optim.lr: {load([]).actor.optim.lr} -> 0.5"
    assert f"wandb: run {branch} branches off run {first} after step 2: {reason}" in capsys.readouterr().out
    shown, config, about = toy.wandb(branch)
    assert sorted(shown) == list(range(1, 9))
    assert config["branch"] == {"parent_run": first, "after_step": 2, "reason": reason}
    assert about == [(f"Branch of run {first} after step 2: {reason}", ["branch"], "toy")]
    assert sorted(toy.wandb(first)[0]) == list(range(1, 9)), "the run that was left stays as it was"
    # From here on it is the run, whatever asks for it.
    assert toy.run("auto", 10, "actor.optim.lr=0.5") == branch
    assert toy.run("6", 12, "actor.optim.lr=0.5") == branch


def test_the_same_command_again_leads_back_to_the_same_branch(toy):
    first = toy.run(None, 8)
    branches = {toy.run("2", until, *LR) for until in (3, 3, 8)}
    assert len(branches) == 1 and first not in branches


def test_back_and_forth(toy):
    first = toy.run(None, 4)
    second = toy.run("2", 6, *LR)
    third = toy.run("2", 6, "actor.optim.lr=0.25", LR[1])
    assert len({first, second, third}) == 3
    assert toy.run("2", 6) == first, "without the change its rows are those of the first run again"
    fourth = toy.run("4", 6, *LR)
    assert fourth not in (first, second, third)
    assert toy.wandb(fourth)[1]["branch"]["parent_run"] == first


def test_another_number_of_ranks(toy, capsys):
    first = toy.run(None, 5, ranks=2)
    capsys.readouterr()
    assert toy.run("auto", 7, ranks=1) == toy.run("auto", 8, ranks=3) == first
    printed = capsys.readouterr().out
    assert printed.count("the numbers stay bit-equal") == 2 and "branches off" not in printed and "!!" not in printed


def test_another_number_of_ranks_where_it_counts(tmp_path):
    toy = Toy(tmp_path, exact=False)
    first = toy.run(None, 5, ranks=2)
    branch = toy.run("auto", 7, ranks=1)
    assert branch != first and toy.wandb(branch)[1]["branch"]["reason"] == "actor ranks: 2 -> 1"
    assert toy.run("auto", 8, ranks=1) == branch
    assert toy.run("auto", 10, ranks=2) == branch, "nothing was logged after step 8"
    # Saved by one rank, resumed by one rank: and yet steps 9 and 10 were made by two.
    assert toy.run("8", 10, ranks=1) != branch


def test_a_rollback_over_a_change_that_replaced_nothing(toy, capsys):
    first = toy.run(None, 4)
    assert toy.run("auto", 8, *LR) == first
    capsys.readouterr()
    branch = toy.run("2", 8)  # what is in the checkpoint and what is asked for are the same; rows 5 to 8 are not
    assert branch != first
    assert "other settings or devices" in capsys.readouterr().out


def test_a_checkpoint_of_another_directory(toy, tmp_path):
    other = toy.run(None, 4)
    here = Toy(tmp_path / "here")
    source = str(toy.checkpoints / "global_step_4")
    here.run(None, 6)
    with pytest.raises(ConfigError, match="already holds global_step_6 and 2 more, and two runs would be mixed there"):
        here.run(source, 6, *LR)
    fresh = Toy(tmp_path / "fresh")
    run_id = fresh.run(source, 6)
    assert run_id != other
    assert fresh.wandb(run_id)[1]["changed_after_step_4"] == [
        f"resumed from another run's {source} (wandb run {other})"
    ]


def test_a_row_that_should_have_been_equal_is_said_and_starts_a_branch(toy, capsys):
    first = toy.run(None, 8)
    capsys.readouterr()
    branch = toy.run("4", 8, drift=1e-9)
    assert branch != first
    printed = capsys.readouterr().out
    assert "!! wandb: the row of step 5 was logged again with other numbers, though settings" in printed
    assert f"run {branch} branches off run {first} after step 4" in printed
    assert sorted(toy.wandb(branch)[0]) == list(range(1, 9))


def test_rows_of_an_older_version_that_did_not_note_them(toy):
    first = toy.run(None, 8)
    (toy.log / "wandb_rows.jsonl").unlink()
    assert toy.run("4", 8) == first
    (toy.log / "wandb_rows.jsonl").unlink()
    assert toy.run("4", 8, *LR) != first


def test_wandb_turned_off_for_a_while(toy):
    first = toy.run(None, 8)
    toy.run("2", 6, *LR, "runner.logger.logger_backends=[tensorboard]")
    branch = toy.run("auto", 8, "actor.optim.lr=0.5")
    assert branch != first
    assert sorted(toy.wandb(branch)[0]) == list(range(1, 9))


@pytest.mark.parametrize("exact", [True, False])
def test_fewer_ranks_and_more_again_in_mid_run(tmp_path, exact):
    """`Build.restore` as the supervisor calls it, after actors were replaced; the workers are played by hand."""
    toy = Toy(tmp_path, exact=exact)
    config = toy.config(None)
    now = toy.identity(config)
    start = choose_start(config.runner, toy.checkpoints)
    prepared = SimpleNamespace(start=start, identity=now, last_step=9)
    log, checkpoints = toy.log, toy.checkpoints
    build = Build(
        config=config, prepared=prepared, checkpoints=checkpoints, log=log, stop=None, request=None, started=0.0
    )
    build._compute, build._recipe = "cpu", recipe(now, {"actor": 2}, "cpu")
    saver = SimpleNamespace(went_back=lambda saved: None)
    with ExitStack() as sinks:
        hub, samples = open_sinks(config, toy.log, start, 9, sinks, made_with=build._recipe)
        runner = SimpleNamespace(progress=Progress(), hub=hub, samples=samples, saver=saver, replicas=None)
        runs = [hub.state()["wandb_run_id"]]
        for ranks, until, next_ranks, resumes_from in (
            (2, 1, 2, 0),
            (2, 5, 1, 4),
            (1, 7, 1, 6),
            (1, 8, 2, 8),
            (2, 9, 0, 9),
        ):
            toy.train(config, runner.hub, runner.progress.step, until, ranks)
            runner.progress.step = until
            if next_ranks:
                toy.let_time_pass()
                build.restore(runner, SimpleNamespace(trainers=Ranks(next_ranks)), sinks)
                assert runner.progress.step == resumes_from
                runs.append(runner.hub.state()["wandb_run_id"])
    assert runs[0] == runs[1] and runs[2] == runs[3] == runs[4] and (runs[1] == runs[2]) is exact
    assert toy.check(runner.hub) == runs[4]
    assert {row.recipe for step, row in SentRows(toy.log).of(runs[4]).items() if step > 8} == {
        recipe(now, {"actor": 2}, "cpu")
    }
