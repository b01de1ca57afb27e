"""The saver between the loop and the ranks: when it begins, waits, hears of the end, and what it says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlinf_lite.checkpoint import Checkpointer, SaveError, SaveReport
from rlinf_lite.cluster.errors import WorkerLost
from rlinf_lite.config import CheckpointConfig, KeepBestConfig
from rlinf_lite.recovery.build import Build
from rlinf_lite.runner.policies import AtLastStep, EverySteps, OnBest, OnSignal, Policy, SaveRequest
from rlinf_lite.runner.progress import Progress
from rlinf_lite.runner.saving import Saver, comparable

NOTHING = (None, None)


def report(
    step: int, *, stall: float = 0.0, durable: float = 2.0, removed: tuple[Path, ...] = (), idle: tuple[str, ...] = ()
) -> SaveReport:
    return SaveReport(
        path=Path(f"ckpt/global_step_{step}"),
        step=step,
        num_bytes=4_000_000_000,
        durable_seconds=durable,
        stall_seconds=stall,
        superseded=None,
        removed=removed,
        idle=idle,
    )


@dataclass
class TwoRanks:
    """Takes the place of `Trainers`. Answers are given in advance; what was asked is kept."""

    answers: dict[str, list[object]] = field(default_factory=dict)
    asked: list[tuple] = field(default_factory=list)
    dead: list = field(default_factory=list)
    clock: float = 0.0
    seconds: float = 0.0  # per call

    def save(self, *args) -> list:
        return self._answer("save", *args)

    def start_save(self, *args) -> list:
        return self._answer("start_save", *args)

    def poll_save(self) -> list:
        return self._answer("poll_save")

    def finish_save(self) -> list:
        return self._answer("finish_save")

    def _answer(self, method: str, *args) -> list:
        self.asked.append((method, *args))
        self.clock += self.seconds
        answer = self.answers[method].pop(0)
        if isinstance(answer, Exception):
            raise answer
        return list(answer)

    def gone(self) -> list:
        return self.dead

    def methods(self) -> list[str]:
        return [method for method, *_ in self.asked]


@pytest.fixture
def make() -> Callable[..., Saver]:
    def make(ranks: TwoRanks, *policies: Policy, flush: Callable[[], None] = lambda: None, **checkpoint) -> Saver:
        return Saver(
            trainers=ranks,
            policies=policies or (EverySteps(1),),
            checkpoint=CheckpointConfig(**checkpoint),
            progress=Progress(),
            saved=0,
            last_step=10,
            info={"tied": {}},
            flush=flush,
            started=0.0,
            request=SaveRequest(),
            is_committed=lambda step, save_id: False,
            clock=lambda: ranks.clock,
        )

    return make


def end_step(saver: Saver, **metrics: float) -> dict:
    """One step as the loop ends it; returns what the saver adds to the row."""
    saver.progress.step += 1
    row = saver.poll()
    saver.between_steps({**metrics, **row}, lambda: {"progress": saver.progress.state()})
    return row


def test_an_async_save_is_told_of_in_the_row_of_the_step_in_which_it_ended(make, capsys):
    ranks = TwoRanks(
        {
            "start_save": [(0.5, 0.25)],
            "poll_save": [NOTHING, (report(1, stall=0.75), None), (None, report(1, stall=2.0, durable=4.0))],
        }
    )
    saver = make(ranks, EverySteps(8), OnSignal())
    saver.request.pending = True
    assert end_step(saver) == {}
    assert not saver.request.pending
    assert end_step(saver) == {} and end_step(saver) == {}  # one rank has ended, the other has not
    ranks.seconds = 3.0
    row = end_step(saver)
    # The poll held the driver for 3 s; of rank 1's 2 s, 0.25 were the driver's too.
    assert row == {
        "time/save_stall": 3.0 + 1.75,
        "time/save_durable": 4.0,
        "save/num_bytes": 4_000_000_000,
        "save/gb_per_second": 1.0,
    }
    assert end_step(saver) == {}
    assert ranks.methods() == ["start_save", "poll_save", "poll_save", "poll_save"]
    printed = capsys.readouterr().out
    assert "saved ckpt/global_step_1 (4.0 GB in 4.00 s, 1.000 GB/s; held the run for 4.750 s): on SIGUSR2" in printed


def test_rows_are_durable_before_a_save_begins(make):
    ranks = TwoRanks({"start_save": [(0.0, 0.0)]})
    saver = make(ranks, flush=lambda: ranks.asked.append(("flush",)))
    end_step(saver)
    assert ranks.methods() == ["flush", "start_save"]


def test_a_save_waits_for_the_one_before_it(make):
    both = [(report(step), report(step)) for step in (1, 2)]
    ranks = TwoRanks({"start_save": [(0.0, 0.0)] * 3, "poll_save": [NOTHING] * 2, "finish_save": both}, seconds=1.0)
    saver = make(ranks)
    end_step(saver)
    assert end_step(saver) == {}
    assert ranks.methods() == ["start_save", "poll_save", "finish_save", "start_save"]
    assert end_step(saver)["time/save_stall"] == 3.0  # start, poll and finish; the start of step 2's save is not in it


def test_two_saves_that_end_in_one_step_fill_two_rows(make):
    ranks = TwoRanks(
        {
            "start_save": [(0.0, 0.0)] * 2,
            "poll_save": [NOTHING, (report(2, durable=5.0),) * 2],
            "finish_save": [(report(1, durable=4.0),) * 2],
        }
    )
    saver = make(ranks, EverySteps(1))
    end_step(saver)
    end_step(saver)
    saver.policies = (AtLastStep(),)
    assert [end_step(saver).get("time/save_durable") for _ in range(3)] == [4.0, 5.0, None]


def test_a_failed_save_is_loud_and_the_next_one_is_tried(make, capsys):
    lost, fine = SaveError("No space left on device"), (report(3), report(3))
    ranks = TwoRanks(
        {"start_save": [(0.0, 0.0)] * 3, "poll_save": [(lost, None), fine], "finish_save": [(None, SaveError("echo"))]}
    )
    saver = make(ranks)
    end_step(saver)
    assert end_step(saver) == {}
    assert "!! SAVE FAILED, there is no checkpoint of step 1: No space left on device" in capsys.readouterr().out
    assert saver.failed == "No space left on device"
    assert end_step(saver)["time/save_durable"] == 2.0
    assert saver.failed is None


def test_a_save_that_cannot_begin_fails_like_any_other(make, capsys):
    def full():
        raise OSError(28, "No space left on device", "metrics.jsonl")

    ranks = TwoRanks()
    saver = make(ranks, flush=full)
    end_step(saver)
    assert ranks.asked == [] and saver.failed is not None and "metrics.jsonl" in saver.failed
    assert "SAVE FAILED" in capsys.readouterr().out
    saver.flush, ranks.answers = lambda: None, {"save": [SaveError("rank 1")]}
    saver.checkpoint.mode = "sync"
    end_step(saver)
    assert saver.failed == "rank 1"


def test_a_sync_save_is_told_of_in_the_next_row(make):
    ranks = TwoRanks({"save": [(report(step), report(step)) for step in (1, 2)]}, seconds=2.5)
    saver = make(ranks, mode="sync")
    assert end_step(saver) == {}
    assert end_step(saver)["time/save_stall"] == 2.5
    assert ranks.methods() == ["save", "save"]


def test_an_error_that_ends_the_run_waits_for_the_save_in_flight(make, capsys):
    ranks = TwoRanks({"start_save": [(0.0, 0.0)], "finish_save": [(report(1), report(1))]})
    saver = make(ranks)
    end_step(saver)
    saver.drain_after_error()
    saver.drain_after_error()
    assert ranks.methods() == ["start_save", "finish_save"]
    assert "saved ckpt/global_step_1" in capsys.readouterr().out


def test_the_error_that_ended_the_run_is_told_not_its_echo(make, capsys):
    ranks = TwoRanks({"start_save": [(0.0, 0.0)], "finish_save": [RuntimeError("rank 0 is gone\nmore")]})
    saver = make(ranks)
    end_step(saver)
    saver.drain_after_error()
    assert "!! the save of step 1 ended with the run: rank 0 is gone\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("step", "committed", "saved"),
    [(1, set(), [1]), (2, set(), [2]), (1, {1}, []), (0, set(), [])],
    ids=["the same step", "a later one", "it got there", "an older state"],
)
def test_a_save_that_was_interrupted_is_repeated(make, step, committed, saved):
    ranks = TwoRanks({"start_save": [(0.0, 0.0)] * 2})
    saver = make(ranks)
    end_step(saver)
    saver.interrupt()
    saver.is_committed = lambda step, save_id: step in committed and save_id == ranks.asked[0][3]["save_id"]
    saver.progress.step = step
    saver.settle(lambda: {})
    saver.settle(lambda: {})
    assert [args[1] for args in ranks.asked[1:]] == saved


def test_a_checkpoint_that_another_save_wrote_is_not_taken_for_the_one_that_was_interrupted(make, tmp_path, capsys):
    """It has the same step: damaged, and stepped over by `auto`, or of a run that went back."""
    ranks, state = TwoRanks({"start_save": [(0.0, 0.0)] * 3}), {"w": torch.zeros(3)}
    saver = make(ranks)
    saver.is_committed = Build(
        config=None, prepared=SimpleNamespace(start=None), checkpoints=tmp_path, log=tmp_path, stop=None, request=None,
        started=0.0,
    ).is_committed  # fmt: skip
    Checkpointer(tmp_path).save(1, state, info={"save_id": "of another save"})
    end_step(saver)
    saver.interrupt()
    saver.settle(dict)
    assert ranks.methods() == ["start_save", "start_save"] and "was committed" not in capsys.readouterr().out
    assert ranks.asked[0][3]["save_id"] != ranks.asked[1][3]["save_id"]
    Checkpointer(tmp_path).save(1, state, info=ranks.asked[1][3])
    saver.interrupt()
    saver.settle(dict)
    assert len(ranks.asked) == 2 and "was committed before its workers were lost" in capsys.readouterr().out


def test_nothing_in_flight_nothing_owed(make):
    ranks = TwoRanks({"start_save": [(0.0, 0.0)], "finish_save": [(report(1), report(1))]})
    saver = make(ranks)
    end_step(saver)
    saver.drain()
    saver.interrupt()
    saver.settle(lambda: {})
    assert ranks.methods() == ["start_save", "finish_save"]


def test_the_newest_step_is_saved_before_leaving(make, capsys):
    ranks = TwoRanks(
        {
            "start_save": [(0.0, 0.0)] * 2,
            "finish_save": [(report(1), report(1)), (report(2), report(2))],
            "poll_save": [NOTHING],
        }
    )
    saver = make(ranks, AtLastStep(), EverySteps(3))
    saver.save_newest("on SIGTERM", dict)
    assert ranks.methods() == []  # nothing is completed yet
    end_step(saver, reward=0.5)
    saver.save_newest("on SIGTERM", dict)
    assert ranks.methods() == ["start_save", "finish_save"]
    assert ranks.asked[0][3]["metrics"] == {"reward": 0.5}
    assert "): on SIGTERM" in capsys.readouterr().out
    saver.save_newest("on SIGTERM", dict)
    assert len(ranks.asked) == 2  # it is there already


def test_what_is_saved_is_not_saved_again(make):
    """A signal in the validation of a step whose save is due: it was saved then, and its row comes later."""
    ranks = TwoRanks({"start_save": [(0.0, 0.0)], "finish_save": [(report(1), report(1))]})
    saver = make(ranks)
    saver.progress.step, saver.progress.unlogged = 1, {"reward": 0.5}
    saver.save_newest("on SIGTERM", dict)
    saver.between_steps({"reward": 0.5}, dict)
    assert ranks.methods() == ["start_save", "finish_save"]


@pytest.mark.parametrize(("step", "saved", "asked"), [(0, 0, []), (4, 4, []), (4, None, ["save"])])
def test_what_a_signal_before_the_first_step_saves(make, step, saved, asked):
    """A new run: nothing; a resumed one: nothing; one that began from another run's checkpoint: that state."""
    ranks = TwoRanks({"save": [(report(4), report(4))]})
    saver = make(ranks, mode="sync")
    saver.progress.step, saver.saved = step, saved
    saver.save_newest("on SIGTERM", dict)
    assert ranks.methods() == asked


def test_after_going_back_to_a_state_in_memory_it_is_saved(make):
    ranks = TwoRanks({"save": [(report(1), report(1)), (report(2), report(2))]})
    saver = make(ranks, mode="sync")
    end_step(saver)
    saver.progress.step = 1
    saver.went_back(None)
    saver.save_newest("on SIGTERM", dict)
    assert ranks.methods() == ["save"], "that very step is saved"
    saver.progress.step = 2
    saver.went_back(None)
    saver.save_newest("on SIGTERM", dict)
    assert ranks.methods() == ["save", "save"]


def test_after_going_back_a_step_is_saved_anew(make):
    ranks = TwoRanks({"save": [(report(1), report(1))] * 2})
    saver = make(ranks, mode="sync")
    end_step(saver)
    saver.progress.step = 0
    saver.went_back(0)
    end_step(saver)
    assert ranks.methods() == ["save", "save"]


def test_a_save_that_is_due_while_the_one_before_is_interrupted(make):
    ranks = TwoRanks({"start_save": [(0.0, 0.0)] * 2, "poll_save": [NOTHING], "finish_save": [WorkerLost("A", 1, "")]})
    saver = make(ranks)
    end_step(saver)
    with pytest.raises(WorkerLost):
        end_step(saver)
    saver.interrupt()
    saver.is_committed = lambda step, save_id: step == 1
    saver.settle(dict)
    assert [args[1] for args in ranks.asked if args[0] == "start_save"] == [1, 2]


def test_a_save_that_failed_because_a_rank_died_is_no_failure_of_the_storage(make, capsys):
    ranks = TwoRanks({"save": [SaveError("rank 1 is silent"), (report(1), report(1))]}, dead=[WorkerLost("A", 1, "")])
    saver = make(ranks, mode="sync")
    with pytest.raises(WorkerLost):
        end_step(saver)
    ranks.dead = []
    saver.interrupt()
    saver.settle(dict)
    assert ranks.methods() == ["save", "save"] and "FAILED" not in capsys.readouterr().out


def test_the_manifest_gets_the_comparable_metrics_of_the_step(make):
    ranks = TwoRanks({"start_save": [(0.0, 0.0)]})
    end_step(make(ranks), **{"reward/mean": 1, "time/step": 3.0, "loss/total": float("nan")})
    _, step, data, info = ranks.asked[0]
    assert info.pop("save_id")
    assert (step, info) == (1, {"tied": {}, "metrics": {"reward/mean": 1.0}})
    assert data["progress"]["step"] == 1
    assert comparable({"a": float("inf"), "save/num_bytes": 1, "memory/x": 1, "throughput/x": 1, "val/x": 0.5}) == {
        "val/x": 0.5
    }


def test_the_best_so_far_is_remembered_in_the_checkpoint(make, capsys):
    ranks = TwoRanks({"save": [(report(step), report(step)) for step in (1, 4)]})
    best = KeepBestConfig(metric="val/loss", mode="min")
    saver = make(ranks, OnBest("val/loss"), mode="sync", keep_best=best, save_on_best=True)
    for value in (2.0, 2.0, float("nan"), 1.5):
        end_step(saver, **{"val/loss": value})
    end_step(saver)
    assert [args[1] for args in ranks.asked] == [1, 4]
    assert ranks.asked[1][2]["progress"]["best"] == {"val/loss": 1.5}
    assert capsys.readouterr().out.count("best val/loss so far") == 2


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_value_that_is_no_finite_number_is_never_the_best(make, mode):
    ranks = TwoRanks({"save": [(report(3), report(3))]})
    best = KeepBestConfig(metric="val/loss", mode=mode)
    saver = make(ranks, OnBest("val/loss"), mode="sync", keep_best=best, save_on_best=True)
    for value in (float("inf"), -float("inf"), 0.5, float("nan")):
        end_step(saver, **{"val/loss": value})
    assert [args[1] for args in ranks.asked] == [3]


def test_a_rule_without_candidates_is_told_once(make, capsys):
    idle = "keep_best: none of the {} checkpoints has a number for val/x, so this rule deletes nothing yet"
    ranks = TwoRanks({"save": [(report(step, idle=(idle.format(step),)),) * 2 for step in (2, 3)]})
    saver = make(ranks, mode="sync")
    end_step(saver), end_step(saver)
    told = [line for line in capsys.readouterr().out.splitlines() if "keep_best" in line]
    assert told == [f"!! runner.checkpoint.{idle.format(2)}"]


def test_what_retention_removed_is_said(make, capsys):
    gone = (Path("ckpt/global_step_1"), Path("ckpt/global_step_2"))
    ranks = TwoRanks({"save": [(report(3, removed=gone), report(3, removed=gone))]})
    end_step(make(ranks, mode="sync"))
    assert "removed global_step_1, global_step_2" in capsys.readouterr().out
