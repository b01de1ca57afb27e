"""Retention: the rules alone, then on directories of real checkpoints."""

import itertools
import math
import random
import shutil

import pytest

from rlinf_lite.checkpoint import Checkpointer, KeepBest, Retention, layout, storage
from rlinf_lite.checkpoint.retention import Entry, apply, idle_rules, to_delete


def entries(*steps, pinned=(), metrics=None):
    given = metrics or {}
    return [Entry(step=step, metrics=given.get(step, {}), pinned=step in pinned) for step in steps]


def rewards(**values):
    return {int(step.removeprefix("s")): {"reward": value} for step, value in values.items()}


def kept_by(retention, found):
    return sorted({entry.step for entry in found} - set(to_delete(found, retention)))


def best(n=1, mode="max", **rules):
    return Retention(keep_best=KeepBest(metric="reward", mode=mode, n=n), **rules)


TENS = (10, 20, 30, 40, 50)


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(), [10, 20, 30, 40, 50]),
        (Retention(keep_last=1), [50]),
        (Retention(keep_last=3), [30, 40, 50]),
        (Retention(keep_last=9), [10, 20, 30, 40, 50]),
        (Retention(keep_every=20), [20, 40, 50]),
        (Retention(keep_every=7), [10, 20, 30, 40, 50]),
        (Retention(keep_every=7, keep_last=2), [40, 50]),
        (Retention(keep_every=20, keep_last=1), [20, 40, 50]),
        (Retention(keep_every=30, keep_last=2), [30, 40, 50]),
        (best(), [10, 20, 30, 40, 50]),
        (best(keep_last=2), [40, 50]),
        (best(keep_every=20), [20, 40, 50]),
        (best(keep_every=7), [10, 20, 30, 40, 50]),
    ],
)
def test_rules_over_steps(retention, kept):
    assert kept_by(retention, entries(*TENS)) == kept
    assert kept_by(retention, entries(*reversed(TENS))) == kept


def test_what_is_to_be_deleted_comes_oldest_first():
    assert to_delete(entries(30, 10, 40, 20), Retention(keep_last=1)) == [10, 20, 30]


def test_nothing_is_deleted_of_nothing():
    assert to_delete([], best(keep_last=1, keep_every=2)) == []


def test_a_pinned_one_stays():
    assert kept_by(Retention(keep_last=1), entries(*TENS, pinned={10, 30})) == [10, 30, 50]


def test_a_pinned_one_counts_as_one_of_the_last():
    assert kept_by(Retention(keep_last=2), entries(*TENS, pinned={40})) == [40, 50]


@pytest.mark.parametrize(
    ("n", "mode", "kept"),
    [(1, "max", [20, 50]), (2, "max", [10, 20, 50]), (1, "min", [40, 50]), (9, "min", [10, 20, 30, 40, 50])],
)
def test_the_best_stay(n, mode, kept):
    values = rewards(s10=0.5, s20=0.9, s30=0.2, s40=-1, s50=0)
    assert kept_by(best(n, mode), entries(*TENS, metrics=values)) == kept


@pytest.mark.parametrize(
    ("rule", "values", "kept"),
    [
        (best(), {}, "10 20 30 40 50"),  # nobody has the metric
        (best(), rewards(s10=math.nan, s30=math.nan), "10 20 30 40 50"),  # nor a number in it
        (best(), rewards(s10=math.nan, s20=0.1), "20 50"),  # one has
        (best(3), rewards(s20=0.1, s30=0.2), "20 30 50"),  # fewer than n have
        (best(2), rewards(s10=1.0, s20=1.0, s30=1.0, s40=1.0, s50=1.0), "10 20 50"),  # all are equal
        (best(1, "min"), rewards(s10=-math.inf, s20=0.0), "10 50"),
        (best(9), rewards(s10=1.0, s20=2.0, s30=3.0, s40=4.0, s50=5.0), "10 20 30 40 50"),
        (best(keep_last=2), rewards(s10=math.nan), "40 50"),
    ],
)
def test_a_rule_without_candidates_deletes_nothing(rule, values, kept):
    assert kept_by(rule, entries(*TENS, metrics=values)) == [int(step) for step in kept.split()]
    pinned = entries(*TENS, pinned={30}, metrics=values)
    assert kept_by(rule, pinned) == sorted({30, *(int(step) for step in kept.split())})


def test_rules_without_candidates_are_named(fill):
    reward = "keep_best: none of the 2 checkpoints has a number for reward, so this rule deletes nothing yet"
    sevens = "keep_every: none of the 2 checkpoints is of a multiple of 7 steps, so this rule deletes nothing yet"
    root = fill(10, 20)
    report = apply(root, best(keep_every=7))
    assert (report.removed, report.idle) == ((), (sevens, reward))
    assert steps_in(root) == [20, 10]
    assert apply(root, best(keep_last=1)).idle == (reward,)
    assert apply(root, best(keep_last=1)).idle == (), "of a single one there is nothing to delete"


@pytest.mark.parametrize("mode", ["max", "min"])
def test_of_equals_the_oldest_is_the_best(mode):
    values = rewards(s10=0, s20=0.0, s30=0)
    assert kept_by(best(1, mode), entries(30, 20, 10, 40, metrics=values)) == [10, 40]


@pytest.mark.parametrize("value", [math.nan, None, "0.99", True, [1], {}])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_what_is_no_number_is_no_candidate(value, mode):
    values = rewards(s10=value, s20=0.5)
    assert kept_by(best(9, mode), entries(10, 20, 30, metrics=values)) == [20, 30]


def test_numbers_of_any_size_are_compared():
    values = rewards(s10=10**400, s20=math.inf, s30=1.0)
    assert kept_by(best(1), entries(10, 20, 30, 40, metrics=values)) == [20, 40]
    assert kept_by(best(2), entries(10, 20, 30, 40, metrics=values)) == [10, 20, 40]


def test_rules_add_up():
    """Over many directories: kept is just what some rule keeps that has a candidate."""
    for seed in range(300):
        choose = random.Random(seed)
        steps = choose.sample(range(100), choose.randint(1, 12))
        values = {step: {"reward": choose.choice([math.nan, 0.0, 0.5, 1.0])} for step in steps}
        found = entries(*steps, pinned=set(choose.sample(steps, len(steps) // 4)), metrics=values)
        last, every, top = choose.randint(1, 4), choose.randint(1, 30), choose.randint(1, 3)
        rules = [Retention(keep_last=last), Retention(keep_every=every), best(top)]
        single = [set(kept_by(rule, found)) for rule in rules if not idle_rules(found, rule)]
        assert set(kept_by(best(top, keep_last=last, keep_every=every), found)) == set.union(*single)
        for number, kept in itertools.product([max(steps)], single):
            assert number in kept


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Retention(keep_last=0), r"keep_last=0: give a whole number of at least 1, or null"),
        (lambda: Retention(keep_every=-5), r"keep_every=-5: "),
        (lambda: Retention(keep_last=2.0), r"keep_last=2\.0: "),
        (lambda: Retention(keep_last=True), r"keep_last=True: "),
        (lambda: KeepBest(metric="reward", mode="best"), r"keep_best\.mode='best': one of max, min"),
        (lambda: KeepBest(metric="reward", n=0), r"keep_best\.n=0: "),
        (lambda: KeepBest(metric=""), r"keep_best\.metric='': give the name"),
    ],
)
def test_bad_values_are_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()


@pytest.fixture(params=["local", "memory"])
def any_root(request, root):
    """A checkpoints directory on the disk, and one behind a URL."""
    if request.param == "local":
        yield root
    else:
        url = storage.storage_path(f"memory://retention{root}")
        yield url
        if url.exists():
            storage.remove_tree(url)


@pytest.fixture
def fill(any_root, make_state):
    """``fill(10, 20)`` saves checkpoints; ``fill(s10=0.5)`` with a metric."""

    def save(*steps, **metrics):
        checkpointer = Checkpointer(any_root, seed=7)
        for step, values in [(step, {}) for step in steps] + list(rewards(**metrics).items()):
            checkpointer.save(step, make_state(step), info={"metrics": values})
        return any_root

    return save


def steps_in(root):
    return [layout.step_of(path) for path in layout.committed(root)]


def test_a_directory_is_thinned_out(fill):
    root = fill(s10=0.9, s20=0.1, s30=0.2, s40=0.3)
    report = apply(root, best(keep_last=2))
    assert report.removed == (root / "global_step_20",)
    assert report.problems == ()
    assert sorted(path.name for path in root.iterdir()) == ["global_step_10", "global_step_30", "global_step_40"]
    assert apply(root, best(keep_last=2)).removed == ()


def test_what_is_pinned_or_protected_stays(fill):
    root = fill(10, 20, 30, 40)
    layout.pin_file(root / "global_step_10").write_bytes(b"")
    report = apply(root, Retention(keep_last=1), protect=[root / "global_step_30"])
    assert [path.name for path in report.removed] == ["global_step_20"]
    assert steps_in(root) == [40, 30, 10]


def test_a_protected_one_may_be_given_by_a_relative_name(root, save, monkeypatch):
    save(10), save(20)
    monkeypatch.chdir(root)
    assert apply(root, Retention(keep_last=1), protect=[storage.storage_path("global_step_10")]).removed == ()


def test_damaged_ones_are_neither_touched_nor_counted(fill):
    root = fill(10, 20, 30, 40)
    for step in (10, 40):
        (root / f"global_step_{step}" / "manifest.json").write_bytes(b"{")
    assert [path.name for path in apply(root, Retention(keep_last=1)).removed] == ["global_step_20"]
    assert (root / "global_step_40" / "data" / "data.pt").is_file()
    assert (root / "global_step_10" / "data" / "data.pt").is_file()


@pytest.mark.parametrize("damage", ["cut", "lost", "added"])
def test_one_whose_files_are_not_of_their_size_takes_no_good_ones_place(fill, damage):
    root = fill(10, 20, 30, 40)
    shard = root / "global_step_30" / "actor" / "__0_0.distcp"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "lost":
        shard.unlink()
    else:
        (root / "global_step_30" / "actor" / "other").write_bytes(b"")
    assert [path.name for path in apply(root, Retention(keep_last=2)).removed] == ["global_step_10"]
    assert steps_in(root) == [40, 30, 20]


def test_incomplete_checkpoints_and_those_set_aside_are_kept(save, root):
    save(10), save(20)
    shutil.copytree(root / "global_step_20", root / "global_step_5.tmp-ab")
    layout.set_aside(save(30))
    (root / "global_step_5").mkdir()
    apply(root, Retention(keep_last=1))
    left = sorted(path.name.split("-")[0] for path in root.iterdir())
    assert left == ["global_step_20", "global_step_30.superseded", "global_step_5", "global_step_5.tmp"]


def test_one_in_use_stays_until_it_is_not(save, root):
    save(10), save(20)
    with storage.in_use(root / "global_step_10" / "manifest.json"):
        report = apply(root, Retention(keep_last=1))
        assert (report.removed, report.problems) == ((), ())
    assert apply(root, Retention(keep_last=1)).removed == (root / "global_step_10",)


def test_a_link_to_a_checkpoint_elsewhere_stays(save, root, tmp_path):
    save(10), save(20)
    (root / "global_step_10").rename(tmp_path / "global_step_10")
    (root / "global_step_10").symlink_to(tmp_path / "global_step_10")
    report = apply(root, Retention(keep_last=1))
    assert (report.removed, report.problems) == ((), ())
    assert (root / "global_step_10").is_symlink()
    assert (tmp_path / "global_step_10" / "manifest.json").is_file()


def test_a_failure_to_delete_is_reported_and_the_others_are_deleted(save, root, monkeypatch):
    save(10), save(20), save(30)
    delete = layout.delete

    def refuse(path):
        if path.name == "global_step_10":
            raise PermissionError(13, "Permission denied", str(path / "actor"))
        delete(path)

    monkeypatch.setattr(layout, "delete", refuse)
    report = apply(root, Retention(keep_last=1))
    assert report.removed == (root / "global_step_20",)
    (problem,) = report.problems
    assert problem.startswith(f"{root}/global_step_10: could not be deleted (Permission denied")


def test_a_directory_that_is_not_there_holds_nothing(tmp_path):
    report = apply(tmp_path / "none", Retention(keep_last=1))
    assert (report.removed, report.problems) == ((), ())


def test_every_save_thins_out(root, make_state):
    checkpointer = Checkpointer(root, seed=7, keep=Retention(keep_last=1, keep_every=4))
    reports = [checkpointer.save(step, make_state(step)) for step in range(1, 7)]
    assert steps_in(root) == [6, 4]
    assert [[path.name for path in report.removed] for report in reports] == [
        [], ["global_step_1"], ["global_step_2"], ["global_step_3"], [], ["global_step_5"],
    ]  # fmt: skip
