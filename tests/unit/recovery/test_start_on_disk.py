"""What a start, a resume and a rollback change on the disk, killed before every one of the changes.

Real checkpoints, rows and functions in a forked process, without workers: the loop is played by `train`.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlinf_lite import faults
from rlinf_lite.checkpoint import Checkpointer, layout, select, storage
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.config import Config
from rlinf_lite.config.compose import load
from rlinf_lite.errors import ConfigError
from rlinf_lite.launch import _how_to_resume
from rlinf_lite.observability import JsonlSink, read_jsonl_rows
from rlinf_lite.observability.jsonl import missing_steps
from rlinf_lite.recovery.build import Build
from rlinf_lite.recovery.handover import ParentLink
from rlinf_lite.recovery.records import BEGAN_AFTER
from rlinf_lite.recovery.resume import Start, choose_start, set_newer_aside
from rlinf_lite.recovery.supervisor import Supervisor
from rlinf_lite.runner.policies import Due
from rlinf_lite.runner.progress import Progress
from rlinf_lite.runner.saving import Saver

PHASES = ["sweep", "aside", "config", "event", "rollouts", "metrics", "tensorboard", "ready"]


@functools.cache
def composed() -> Config:
    """The embedded default, as Hydra composes it."""
    return load([])


def config_of(resume_dir: object) -> Config:
    config = composed().model_copy(deep=True)
    config.runner.resume_dir = None if resume_dir == "null" else str(resume_dir)
    return config


@dataclass
class OnDisk:
    """A run's directory, and the parts of a driver that write there."""

    directory: Path

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def build(self, resume_dir: str, last_step: int, *backends: str) -> Build:
        self.directory.mkdir(exist_ok=True)
        config = config_of(resume_dir)
        config.runner.logger.log_rollouts = -1
        config.runner.logger.log_path = str(self.directory)
        config.runner.logger.logger_backends = list(backends)
        start = choose_start(config.runner, self.checkpoints)
        return Build(
            config=config,
            prepared=SimpleNamespace(start=start, last_step=last_step),
            checkpoints=self.checkpoints,
            log=self.directory,
            stop=None,
            request=None,
            started=0.0,
        )

    def save(self, step: int) -> None:
        Checkpointer(self.checkpoints).save(step, {"model": {"w": torch.tensor([float(step)])}}, data=data_of(step))

    def train(self, resume_dir: str, last_step: int, *backends: str) -> Start:
        """A start and its steps: rows and responses of each, a checkpoint after every other one."""
        build = self.build(resume_dir, last_step, *backends)
        start = build.prepared.start
        with ExitStack() as sinks:
            hub, samples = build._begin_on_disk(start, sinks)
            for step in range(start.progress.step + 1, last_step + 1):
                samples.log_rows(step, [{"sample": 0}, {"sample": 1}])
                hub.log(step, {"reward/mean": step / 3})
                if step % 2 == 0:
                    self.save(step)
        return start

    def rows(self, name: str = "metrics.jsonl") -> list[int]:
        return [row["step"] for row in read_jsonl_rows(self.directory / name)]

    def content(self) -> dict[str, bytes]:
        files = (path for path in self.directory.rglob("*") if path.is_file())
        return {str(path.relative_to(self.directory)): path.read_bytes() for path in files}


def data_of(step: int) -> dict:
    return {"progress": Progress(step=step).state(), "observability": {"wandb_run_id": None, "last_step": step}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run's directory after eight steps, saved at 2, 4, 6 and 8. Tests change copies of it."""
    made = OnDisk(tmp_path_factory.mktemp("trained") / "run")
    made.train("auto", 8)
    return made.directory


@pytest.fixture
def run(trained, tmp_path) -> OnDisk:
    """A copy of `trained`."""
    return OnDisk(Path(shutil.copytree(trained, tmp_path / "run")))


def killed(act, *table: dict) -> None:
    """Do it in a forked process, which must die of one of the faults."""
    child = os.fork()
    if child == 0:
        os.environ[faults.VARIABLE] = json.dumps(table)
        faults._table.cache_clear()
        act()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"ended with {status}"


def kill_at(phase: str) -> dict:
    return {"phase": f"resume.{phase}", "action": "kill"}


def assert_whole(run: OnDisk, last_step: int) -> None:
    assert run.rows() == [*range(1, last_step + 1)]
    assert run.rows("rollouts.jsonl") == [step for step in range(1, last_step + 1) for _ in range(2)]
    assert [layout.step_of(path) for path in layout.committed(run.checkpoints)] == [*range(last_step, 0, -2)]


def assert_rows_reach_the_newest(run: OnDisk) -> None:
    newest = layout.step_of(layout.committed(run.checkpoints)[0])
    assert missing_steps(run.directory / "metrics.jsonl", newest) == []
    assert set(run.rows("rollouts.jsonl")) >= set(range(1, newest + 1))


@pytest.mark.parametrize(
    ("phase", "second"),
    [
        *((phase, None) for phase in PHASES),
        ("aside of 6", "rollouts"),
        ("aside of 6", "metrics"),
        ("rollouts", "metrics"),
    ],
)
def test_a_kill_while_a_run_goes_back(run, phase, second, capsys):
    """To step 4 of 8, and then again in the middle of what repairs it."""
    strike = {**kill_at("aside"), "step": 6} if phase == "aside of 6" else kill_at(phase)
    backends = ["tensorboard"] if "tensorboard" in (phase, second) else []
    killed(lambda: run.train(str(run.checkpoints / "global_step_4"), 10, *backends), strike)
    assert_rows_reach_the_newest(run)
    if second is not None:
        killed(lambda: run.train("auto", 10, *backends), kill_at(second))
        assert_rows_reach_the_newest(run)
    capsys.readouterr()
    run.train("auto", 10)
    assert_whole(run, 10)
    assert "!!" not in capsys.readouterr().out
    assert not list(run.directory.glob("*.old*"))


@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_after_a_damaged_checkpoint_was_stepped_over_which_heals(run, phase, capsys):
    """An error of the storage that passes: rows that it counts on may be gone by then."""
    manifest = run.checkpoints / "global_step_8" / "manifest.json"
    content = manifest.read_bytes()
    manifest.write_bytes(b"{")
    backends = ["tensorboard"] if phase == "tensorboard" else []
    killed(lambda: run.train("auto", 10, *backends), kill_at(phase))
    for path in run.checkpoints.glob("global_step_8*/manifest.json"):
        path.write_bytes(content)
    assert_rows_reach_the_newest(run)
    run.train("auto", 10)
    assert_whole(run, 10)
    assert "are missing or repeated" not in capsys.readouterr().out


@pytest.mark.parametrize("phase", ["sweep", "config", "event", "rollouts", "metrics", "tensorboard", "ready"])
def test_a_kill_while_a_new_run_begins_where_another_was(tmp_path, phase):
    run = OnDisk(tmp_path / "run")
    run.train("auto", 1)
    killed(lambda: run.train("auto", 4, "tensorboard"), kill_at(phase))
    run.train("auto", 4)
    assert_whole(run, 4)
    assert run.rows("metrics.old1.jsonl") == [1] and run.rows("rollouts.old1.jsonl") == [1, 1]
    assert len(list(run.directory.glob("*.old*"))) == 2


@pytest.mark.parametrize("phase", ["aside", "event", "rollouts", "metrics"])
def test_a_kill_while_a_run_that_lost_its_ranks_goes_back(run, phase, capsys):
    """Found then: the checkpoint of step 8 does not verify."""
    build = run.build("auto", 10)
    build.log, build.prepared.start = run.directory, None

    def go_back() -> None:
        (run.checkpoints / "global_step_8" / "manifest.json").write_bytes(b"{")
        start = choose_start(build.config.runner, run.checkpoints)
        saver = SimpleNamespace(went_back=lambda saved: None)
        hub = SimpleNamespace(state=lambda: {"wandb_run_id": None, "last_step": 9})
        runner = SimpleNamespace(progress=Progress(step=9), saver=saver, hub=hub)
        build._log_from(start, runner, ExitStack(), same_recipe=True)

    killed(go_back, kill_at(phase))
    assert missing_steps(run.directory / "metrics.jsonl", 6) == []
    capsys.readouterr()
    run.train("auto", 10)
    assert_whole(run, 10)
    assert "are missing or repeated" not in capsys.readouterr().out


@pytest.mark.parametrize("resume_dir", ["auto", "global_step_4"])
def test_where_there_is_nothing_to_do_nothing_is_changed(run, resume_dir):
    (run.checkpoints / "global_step_9.tmp-0a1b2c3d").mkdir()
    (run.checkpoints / "global_step_9.tmp-0a1b2c3d" / "half").write_bytes(b"half")
    before = run.content()
    given = resume_dir if resume_dir == "auto" else str(run.checkpoints / resume_dir)
    run.train(given, 4)
    assert run.content() == before
    run.train("auto", 10)
    assert_whole(run, 10)


def test_a_last_step_whose_row_is_still_to_come_is_something_to_do(run):
    chosen = choose_start(config_of("auto").runner, run.checkpoints).selection
    assert not Start(selection=chosen, progress=Progress(step=4, unlogged={"reward/mean": 0.5})).is_done(4)
    assert Start(selection=chosen, progress=Progress(step=4)).is_done(4)


def test_missing_rows_are_logged_with_the_way_to_get_them(run, capsys):
    def keep(*steps: int) -> None:
        lines = [f'{{"step": {step}, "reward/mean": {step / 3}}}\n' for step in steps]
        (run.directory / "metrics.jsonl").write_text("".join(lines))

    for left, missing, again in (
        ((1, 2, 3, 4), "steps 5-8", "global_step_4"),
        ((1, 2, 4, 5, 6, 6, 8), "steps 3, 6-7", "global_step_2"),
        ((), "steps 1-8", "a new run under another runner.experiment_name"),
    ):
        keep(*left)
        capsys.readouterr()
        run.train("auto", 9)
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("!!")]
        assert f"the rows of {missing} are missing" in line and line.endswith(again), line
    keep(4, 5, 6, 7, 8)  # a run that began from a checkpoint of another one
    run.train("auto", 9)
    assert "!!" not in capsys.readouterr().out


def test_what_is_set_aside_says_why(run, capsys):
    (run.checkpoints / "global_step_8" / "manifest.json").write_bytes(b"{")
    start = choose_start(config_of("auto").runner, run.checkpoints)
    set_newer_aside(start, run.checkpoints)
    assert "global_step_8 did not verify; it is now global_step_8.damaged-" in capsys.readouterr().out
    start = choose_start(config_of(run.checkpoints / "global_step_4").runner, run.checkpoints)
    set_newer_aside(start, run.checkpoints)
    assert "global_step_6 is newer than step 4" in capsys.readouterr().out
    assert [layout.step_of(path) for path in layout.committed(run.checkpoints)] == [4, 2]


def test_the_same_in_an_object_store(run, capsys):
    """There a rename is a copy and a deletion."""
    store = storage.storage_path("memory://bucket/set_aside")
    for step in (2, 4, 6, 8):
        Checkpointer(store).save(step, {"w": torch.tensor([float(step)])}, data={"step": step})
    (store / "global_step_8" / "manifest.json").write_bytes(b"{")
    chosen = select("auto", store, verify="full")
    set_newer_aside(Start(selection=chosen, progress=Progress(step=6), automatic=True), store)
    chosen = select(str(store / "global_step_4"), store, verify="full")
    set_newer_aside(Start(selection=chosen, progress=Progress(step=4)), store)
    assert [layout.step_of(path) for path in layout.committed(store)] == [4, 2]
    damaged, superseded = sorted(layout.set_aside_in(store), key=lambda path: "damaged" not in path.name)
    assert damaged.name.startswith("global_step_8.damaged-")
    manifests.read_verified(superseded, "full")
    assert layout.sweep(store) == []


def test_no_checkpoint_but_some_that_were_set_aside(run, capsys):
    for path in layout.committed(run.checkpoints):
        layout.set_aside(path)
    choose_start(config_of("auto").runner, run.checkpoints)
    said = capsys.readouterr().out
    assert "holds global_step_2.superseded-" in said and "rename it" in said


def test_a_pin_is_never_lost_on_the_way(run, monkeypatch):
    path = run.checkpoints / "global_step_8"
    layout.pin_file(path).touch()
    JsonlSink(run.directory / "other.jsonl", committed_step=None).close()

    def stop(self: Path, target: Path) -> None:
        assert layout.is_pinned(self) and layout.is_pinned(target)
        raise InterruptedError

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(InterruptedError):
        layout.set_aside(path)
    assert layout.is_pinned(path)


def saver_of(build: Build, run: OnDisk) -> Saver:
    """The run's own, over one rank whose checkpoints are real."""

    def save(step: int, data: dict, info: dict) -> list:
        return [Checkpointer(run.checkpoints).save(step, {"w": torch.zeros(1)}, data=data, info=info)]

    build.config.runner.checkpoint.mode = "sync"
    start, trainers = build.prepared.start, SimpleNamespace(save=save)
    return build._saver(SimpleNamespace(trainers=trainers), start, build._info(start, {}))


@pytest.mark.parametrize(("begins", "saved"), [("none", []), ("own", [4, 2]), ("another's", [4])])
def test_stopped_before_its_first_step_a_run_can_be_resumed_as_printed(run, tmp_path, begins, saved, capsys):
    given = str(run.checkpoints / "global_step_4")
    here = run if begins == "own" else OnDisk(tmp_path / "here")
    build = here.build("null" if begins == "none" else given, 10)
    with ExitStack() as sinks:
        build._begin_on_disk(build.prepared.start, sinks)
    saver_of(build, here).save_newest("on SIGTERM", lambda: data_of(build.prepared.start.progress.step))
    assert [layout.step_of(path) for path in layout.committed(here.checkpoints)] == saved
    workers = SimpleNamespace(session=SimpleNamespace(watch=None))
    supervisor = Supervisor(build, workers, None, ParentLink())
    assert not supervisor.has_saved, "until the start is through"
    supervisor.runner = SimpleNamespace(progress=build.prepared.start.progress)
    assert supervisor.has_saved is bool(saved)
    printed = _how_to_resume(build.config, early=True, saved=supervisor.has_saved)
    assert printed == ("the same command with runner.resume_dir=auto" if saved else "the same command")
    capsys.readouterr()
    assert here.train("auto" if saved else "null", 6).progress.step == (4 if saved else 0)
    assert "are missing or repeated" not in capsys.readouterr().out
    build.config.runner.resume_mode = "weights"
    assert not supervisor.has_saved


def test_where_the_rows_begin_is_known_ever_after(run, tmp_path):
    here = OnDisk(tmp_path / "here")
    build = here.build(str(run.checkpoints / "global_step_4"), 10)
    info = build._info(build.prepared.start, {})
    saver_of(build, here)._begin(Due(""), lambda: data_of(4), {})
    resumed = here.build("auto", 10)
    assert resumed._info(resumed.prepared.start, {}) == info == {BEGAN_AFTER: 4}
    whole = run.build("auto", 10)
    assert whole._info(whole.prepared.start, {}) == {BEGAN_AFTER: 0}


def test_two_runs_are_not_mixed_in_one_directory(run, tmp_path):
    """Of steps 1 to 4 of one run and what comes after step 4 of another."""
    here, given = OnDisk(tmp_path / "here"), str(run.checkpoints / "global_step_4")
    here.train("auto", 3)
    before = here.content()
    with pytest.raises(
        ConfigError, match=r"already holds global_step_2, .* another runner\.experiment_name, or resume"
    ):
        here.train(given, 6)
    assert here.content() == before
    shutil.rmtree(here.checkpoints)
    with pytest.raises(
        ConfigError, match=r"after step 4, but .*metrics\.jsonl holds rows from step 1 on, .* move that"
    ):
        here.train(given, 6)
    assert here.rows() == [1, 2, 3]


def test_a_start_from_another_run_that_was_killed_before_its_first_save_comes_again(run, tmp_path):
    here, given = OnDisk(tmp_path / "here"), str(run.checkpoints / "global_step_4")
    here.train(given, 5)
    here.train(given, 8)
    assert here.rows() == [5, 6, 7, 8] and not list(here.directory.glob("*.old*"))
    link = tmp_path / "linked"
    link.symlink_to(here.directory)
    assert here.train(str(link / "checkpoints" / "global_step_6"), 9).progress.step == 6, "by another name its own"
    assert here.rows() == [5, 6, 7, 8, 9]
