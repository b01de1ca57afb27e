"""Kills at random instants, and every run ends in the bits of the one that nothing happened to; `chaos.py` does it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlinf_lite.cluster.forks.client import TEMPLATE_VARIABLE
from rlinf_lite.recovery.restarts import GaveUp, RestartBudget

SOAK = Path(__file__).parent
pytestmark = pytest.mark.timeout(3600)  # some 3 minutes on 2 quiet cores, 10 times that on a busy machine


def run_chaos(*options: str, seconds: float = 3500) -> str:
    """What the command prints; it must find every run bit-equal."""
    command = [sys.executable, str(SOAK / "chaos.py"), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def plan(monkeypatch):
    monkeypatch.syspath_prepend(SOAK)
    import _plan

    return _plan


SHORT_STEPS, STEPS = 8, 12
SHORT = "cluster.component_placement.rollout=0", "cluster.warm_spares=0"
"""A run of few workers."""
COMMAND_STARTS_AGAIN = ("all", "damage")
"""Kinds after which the command is started again. In the default run the other kinds have tests of their own: driver
and parent in `test_parent`, workers in `test_recovery`, the raylet in `test_ray_lost`, a kill before each change of a
start in `test_start_on_disk`."""
SHORT_SEED = 980
"""Its first case has one kill of each of these two kinds: a damaged checkpoint after step 3, and then everything is
killed while it starts again."""
GIVEN_UP_SEED = 41
"""Its first case kills three drivers during their start."""
SEED = 10554
"""Its first case has one kill of each kind, three of them during a start or a recovery. One in some ten thousand
seeds is such a one; with other kinds, look for another."""

PPO_SEED = 569


def test_the_command_starts_again_and_again(plan, straight, forks, start_forked, monkeypatch, tmp_path, capsys):
    """The instants within a step depend on the machine; equality does not. Against the run of other tests, whose
    settings are the same, except for the number of ranks: 2 there, 3, 2 and 1 here. In the soak tests each command is
    started by running Python, and each driver starts a fork server of its own, as for a user."""
    import chaos

    monkeypatch.setenv(TEMPLATE_VARIABLE, forks.name)
    assert [plan.draw_ranks(SHORT_SEED, 1, start) for start in range(3)] == [3, 2, 1]
    kills = plan.draw(SHORT_SEED, 1, COMMAND_STARTS_AGAIN, 2, SHORT_STEPS).kills
    assert [(kill.victim, kill.step) for kill in kills] == [("damage", 3), ("all", 0)]
    options = [
        *("--kills", "2", "--kills-per-run", "2", "--seed", str(SHORT_SEED), "--strict", "--directory", str(tmp_path)),
        *("--elastic", "--victims", ",".join(COMMAND_STARTS_AGAIN), f"runner.max_steps={SHORT_STEPS}", *SHORT),
        *("--undisturbed", str(straight.directory), "runner.val_check_interval=4"),  # as in that run
    ]
    failed, printed = chaos.main(options, begin=start_forked), capsys.readouterr().out
    assert not failed, printed
    assert "ranks 3, 2, 1" in printed and "2 kills, 2 bit-equal" in printed, printed


@pytest.mark.soak
def test_each_kind_of_kill_once(plan, tmp_path):
    number = str(len(plan.KINDS))
    kinds = [kill.victim for kill in plan.draw(SEED, 1, plan.KINDS, len(plan.KINDS), STEPS).kills]
    assert sorted(kinds) == sorted(plan.KINDS)
    printed = run_chaos(
        *("--kills", number, "--kills-per-run", number, "--seed", str(SEED), "--strict", "--directory", str(tmp_path)),
        *(f"runner.max_steps={STEPS}", *SHORT),
    )
    assert f"{number} kills, {number} bit-equal" in printed, printed


@pytest.mark.soak
def test_a_command_that_gives_up_after_three_equal_kills_is_started_again(plan, tmp_path):
    assert [kill.step for kill in plan.draw(GIVEN_UP_SEED, 1, ("driver",), 3, SHORT_STEPS).kills] == [0, 0, 0]
    printed = run_chaos(
        *("--case", "1", "--kills-per-run", "3", "--seed", str(GIVEN_UP_SEED), "--victims", "driver", "--strict"),
        *("--directory", str(tmp_path), f"runner.max_steps={SHORT_STEPS}", *SHORT),
    )
    assert "1 restarts, 1 after three equal kills" in printed and "3 kills, 3 bit-equal" in printed, printed


@pytest.mark.soak
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_twenty_kills_and_other_numbers_of_ranks(algorithm, tmp_path):
    printed = run_chaos(
        *("--elastic", "--algorithm", algorithm, "--victims", "parent,all,damage,change", "--kills", "20"),
        *("--kills-per-run", "10", "--seed", "17", "--strict", "--directory", str(tmp_path)),
    )
    assert "20 kills, 20 bit-equal" in printed, printed


@pytest.mark.soak
def test_ten_kills(tmp_path):
    printed = run_chaos(
        "--kills", "10", "--kills-per-run", "10", "--seed", "7903", "--strict", "--directory", str(tmp_path)
    )
    assert "10 kills, 10 bit-equal" in printed, printed


@pytest.mark.soak
def test_ten_kills_with_ppo(plan, tmp_path):
    """Three of them of critic ranks, one in the recovery from another kill; Ray is lost while the critic is updated."""
    kinds = (*plan.KINDS, plan.CRITIC)
    kills = plan.draw(PPO_SEED, 1, kinds, 10, STEPS).kills
    assert [kill.step for kill in kills if kill.victim == plan.CRITIC] == [6, 0, 12]
    printed = run_chaos(
        *("--algorithm", "ppo", "--kills", "10", "--kills-per-run", "10", "--seed", str(PPO_SEED), "--strict"),
        *("--directory", str(tmp_path), f"runner.max_steps={STEPS}", "algorithm.n_minibatches=2"),
    )
    assert "(critic.update)" in printed and "10 kills, 10 bit-equal" in printed, printed


@pytest.mark.soak
@pytest.mark.timeout(6 * 3600)
@pytest.mark.parametrize("where", [(), ("--cluster",)], ids=["one node", "several nodes"])
def test_two_hundred_kills(where, tmp_path):
    given = "--kills", "200", "--seed", "1", "--strict", "--directory", str(tmp_path), *where
    printed = run_chaos(*given, seconds=6 * 3600)
    assert "200 kills, 200 bit-equal" in printed, printed


def test_a_seed_says_all(plan):
    draw, kinds = plan.draw, plan.KINDS
    assert draw(7, 3, kinds, None, 30) == draw(7, 3, kinds, None, 30)
    old = [kill.victim for kill in draw(707, 1, plan.ANYWHERE, 4, 30).kills]
    assert sorted(old) == ["actor", "all", "reward", "rollout"]  # as before there were other kinds
    assert len({draw(7, case, kinds, None, 30) for case in range(20)}) == 20
    kills = [kill for case in range(200) for kill in draw(7, case, kinds, None, 30).kills]
    assert {kill.victim for kill in kills} == {*kinds} and {kill.step for kill in kills} == {*range(31)}
    assert min(kill.share for kill in kills) < 0.05 and max(kill.share for kill in kills) > 0.95
    assert max(kill.step for kill in kills if kill.victim == "phase") == 24  # its phase is still to come


def test_a_kill_waits_for_its_step_on_a_machine_of_any_speed(plan):
    def strikes(kill, lines, since=0.0, survived=False):
        steps = [plan.StepLine(step=step, at=at) for step, at in lines]
        return next(
            at for at in range(1000) if pace.is_due(kill, at, [s for s in steps if s.at <= at], since, survived)
        )

    pace = plan.Pace(start=100.0, step=20.0, recovery=50.0)
    common = {"victim": "driver", "rank": 0, "share": 0.5, "returns": 0.0}
    at_step, in_start = (plan.Kill(step=step, **common) for step in (2, 0))
    assert strikes(at_step, [(1, 300), (2, 400), (3, 420)]) == 410
    assert strikes(at_step, [(1, 3), (2, 4), (3, 5)]) == 5  # ten times as fast as before: when the step is over
    assert strikes(at_step, [(7, 400)]) == 410  # resumed beyond it
    assert strikes(in_start, [(1, 300)]) == 50 and strikes(in_start, [(1, 30)]) == 30
    assert strikes(in_start, [(1, 30)], since=35) == 85 and strikes(in_start, [(1, 30)], since=35, survived=True) == 60
    pace.take_in([plan.StepLine(step=1, at=30.0)], started=10.0, last_kill=0.0)
    pace.take_in([plan.StepLine(step=step, at=at) for step, at in ((1, 30.0), (2, 34.0))], started=10.0, last_kill=9.0)
    pace.take_in([plan.StepLine(step=step, at=at) for step, at in ((2, 34.0), (3, 44.0))], started=10.0, last_kill=37.0)
    assert pace == plan.Pace(start=20.0, step=4.0, recovery=7.0)


LOOP = [("driver", 6), ("driver", 0), ("driver", 5)]


@pytest.mark.parametrize(
    ("code", "given_up", "killed", "had_to"),
    [
        (3, 5, LOOP, True),
        (3, 5, [("actor", 4), *LOOP], True),
        (3, None, LOOP, False),  # for another reason
        (1, 5, LOOP, False),
        (-9, 5, LOOP, False),
        (3, 5, LOOP[1:], False),  # a death that was not ours
        (3, 5, [*LOOP, ("raylet", 5)], False),  # not equal
        (3, 5, [("driver", 3), *LOOP[1:]], False),  # steps between them
    ],
)
def test_only_three_equal_kills_excuse_a_command_that_gives_up(code, given_up, killed, had_to, monkeypatch):
    monkeypatch.syspath_prepend(SOAK)
    from _case import had_to_end

    assert had_to_end(code, given_up, killed) is had_to


def test_what_a_command_prints_when_it_gives_up_is_understood(monkeypatch):
    monkeypatch.syspath_prepend(SOAK)
    from _job import EQUAL_DEATHS

    budget = RestartBudget(max_restarts=10, window_seconds=3600.0)
    with pytest.raises(GaveUp) as error:
        [budget.admit(step=5, cause="killed", death=True) for _ in range(3)]
    assert [m[1] for line in error.value.lines().splitlines() if (m := EQUAL_DEATHS.match(line))] == ["5"]


@pytest.fixture
def compared(straight, tmp_path, monkeypatch):
    """A copy of a run that nothing happened to, and a function that holds it against the original."""
    monkeypatch.syspath_prepend(SOAK)
    from _compare import differences

    copy = tmp_path / "copy"
    shutil.copytree(straight.directory, copy)
    return copy, lambda: differences(straight.directory, copy, 8)


LARGER_DAMAGE = "the last", "an unfinished save", "other counters"


@pytest.mark.soak  # the test of a run that is bit-equal finds it, too
def test_a_copy_is_equal(compared):
    assert compared[1]() == []


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(name, damage, marks=[] if damage == "changed" else pytest.mark.soak)
        for name in ("metrics.jsonl", "rollouts.jsonl")
        for damage in ("missing", "doubled", "moved", "changed", "torn")
    ],
)
def test_every_row_counts(name, damage, compared):
    directory, differences = compared
    file = directory / name
    lines = file.read_text().splitlines(keepends=True)
    if damage == "changed":
        row = json.loads(lines[-2])
        key = "response_ids" if "response_ids" in row else "optim/grad_norm"
        lines[-2] = json.dumps(row | {key: [1] if key == "response_ids" else row[key] * (1 + 1e-15)}) + "\n"
    elif damage == "moved":
        lines.insert(0, lines.pop())
    else:
        lines[-1:] = {"missing": [], "doubled": lines[-1:] * 2, "torn": [lines[-1][:20]]}[damage]
    file.write_text("".join(lines))
    assert differences()


@pytest.mark.parametrize(
    "damage", ["other tensors", *(pytest.param(each, marks=pytest.mark.soak) for each in LARGER_DAMAGE)]
)
def test_every_checkpoint_counts(damage, compared):
    directory, differences = compared
    last, before = (directory / "checkpoints" / f"global_step_{step}" for step in (8, 7))
    if damage == "the last":
        shutil.rmtree(last)
    elif damage == "an unfinished save":
        last.with_name("global_step_8.tmp-00").mkdir()
    elif damage == "other tensors":
        shutil.rmtree(last)
        shutil.copytree(before, last)
    else:
        shutil.copy(before / "data" / "data.pt", last / "data" / "data.pt")
    assert differences()


@pytest.mark.soak
def test_damage_hits_the_newest_intact_checkpoint_and_spares_the_last(compared):
    from _traps import damage

    directory, differences = compared
    damages = [damage(directory / "checkpoints", number) for number in range(7)]
    assert [found and found.name.split("/")[0] for found in damages] == [f"global_step_{n}" for n in range(8, 1, -1)]
    assert damage(directory / "checkpoints", 0) is None
    assert any("its blake3 is not the one in the manifest" in text for text in differences())
    for found in damages:
        found.undo()
    assert not differences()
