"""Which checkpoint a run resumes from, with real checkpoints of one process; the test plays the ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from rlinf_lite.checkpoint import Checkpointer, DamagedCheckpoint, LoadReport, SectionMismatch
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.cluster.workers.records import RankLayout
from rlinf_lite.config import Config, ConfigError, keys
from rlinf_lite.config.compose import load
from rlinf_lite.recovery.identity import ADDED, carried_on
from rlinf_lite.recovery.resume import (
    check_identity,
    choose_start,
    initial_weights,
    log_missing_rows,
    log_what_differs,
    recipe,
    restore,
    what_differs,
)
from rlinf_lite.runner.progress import Progress

INITIAL = "actor.model (initial weights)"
IDENTITY = {"lr": 1.0, INITIAL: None} | {key: keys()[key].default for key in ADDED}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """global_step_1 to 3 of a run with IDENTITY."""
    return save(tmp_path / "checkpoints", (1, 2, 3))


def save(root: Path, steps: tuple[int, ...], identity: dict | None = None) -> Path:
    for step in steps:
        data = {"progress": Progress(step=step, cursor=8 * step).state(), "observability": {"wandb_run_id": None}}
        info = {"identity": identity or IDENTITY, "compute": "cpu"}
        Checkpointer(root).save(step, {"model": {"w": torch.full((8,), float(step))}}, data=data, info=info)
    return root


def asks(*overrides: str) -> Config:
    return load(["runner.resume_dir=auto", *overrides])


@dataclass
class Ranks:
    """Takes the place of `Trainers`: finds the named checkpoints damaged."""

    damaged: tuple[str, ...] = ()
    layout: RankLayout = field(default_factory=lambda: RankLayout(sizes={"actor": 1}))
    asked: list[tuple] = field(default_factory=list)

    def load(self, path: str, verify: str) -> LoadReport:
        return self._answer("load", path, verify)

    def load_weights(self, path: str, verify: str) -> LoadReport:
        return self._answer("load_weights", path, verify)

    def _answer(self, method: str, path: str, verify: str) -> LoadReport:
        self.asked.append((method, Path(path).name, verify))
        if Path(path).name in self.damaged:
            raise DamagedCheckpoint(f"{path}: its blake3 is not the one in the manifest")
        manifest = manifests.read(Path(path))
        return LoadReport(path=Path(path), manifest=manifest, load_seconds=0.1, rng_restored=True, num_bytes=1)


def resume(config: Config, checkpoints: Path, ranks: Ranks, now: dict = IDENTITY):
    return restore(choose_start(config.runner, checkpoints), ranks, config.runner, checkpoints, now, "cpu")


def test_the_newest_is_loaded_and_verified_by_the_ranks(checkpoints, capsys):
    ranks = Ranks()
    start = resume(asks(), checkpoints, ranks)
    assert (start.progress.step, start.progress.cursor, start.committed_step) == (3, 24, 3)
    assert ranks.asked == [("load", "global_step_3", "full")]
    assert "resumed from global_step_3" in capsys.readouterr().out


def test_what_the_ranks_find_damaged_is_stepped_over_once_and_said_once(checkpoints, capsys):
    ranks = Ranks(damaged=("global_step_2",))
    (checkpoints / "global_step_3" / "manifest.json").write_text("{}")
    start = resume(asks(), checkpoints, ranks)
    assert start.progress.step == 1
    assert [path for _, path, _ in ranks.asked] == ["global_step_2", "global_step_1"]
    printed = capsys.readouterr().out
    assert printed.count("stepped over a damaged checkpoint") == 2
    assert "global_step_2: its blake3" in printed and "global_step_3/manifest.json: not a manifest" in printed
    assert (checkpoints / "global_step_3").is_dir() and (checkpoints / "global_step_2").is_dir()


def test_when_none_is_left_each_reason_was_printed_once(checkpoints, capsys):
    """On the way, or in the error: of the ranks, of the manifest, and of a record in ``data.pt``."""
    (checkpoints / "global_step_1" / "manifest.json").write_text("{}")
    (checkpoints / "global_step_3" / "manifest.json").write_text("{}")
    Checkpointer(checkpoints).save(4, {"model": {"w": torch.zeros(8)}}, data={"progress": None, "observability": {}})
    with pytest.raises(DamagedCheckpoint, match="none of the 4 checkpoints") as caught:
        resume(asks(), checkpoints, Ranks(damaged=("global_step_2",)))
    said = capsys.readouterr().out + str(caught.value)
    for step, reason in (
        (1, "not a manifest"),
        (2, "its blake3"),
        (3, "not a manifest"),
        (4, "progress is a NoneType"),
    ):
        assert sum(f"global_step_{step}" in line and reason in line for line in said.splitlines()) == 1, said


def test_a_given_path_is_not_stepped_over(checkpoints):
    config = asks(f"runner.resume_dir={checkpoints / 'global_step_2'}")
    with pytest.raises(DamagedCheckpoint, match="global_step_2: its blake3"):
        resume(config, checkpoints, Ranks(damaged=("global_step_2",)))
    assert resume(config, checkpoints, Ranks()).progress.step == 2


@pytest.mark.parametrize("verify", ["size", "off"])
def test_a_damaged_data_file_is_stepped_over_at_every_level(checkpoints, verify):
    file = checkpoints / "global_step_3" / "data" / "data.pt"
    file.write_bytes(b"\0" * file.stat().st_size)
    assert resume(asks(f"runner.checkpoint.verify={verify}"), checkpoints, Ranks()).progress.step == 2


def test_counters_of_another_version_are_stepped_over(checkpoints, capsys):
    data = {"progress": {"step": 4}, "observability": {}}
    Checkpointer(checkpoints).save(4, {"model": {"w": torch.zeros(8)}}, data=data, info={"identity": IDENTITY})
    assert resume(asks(), checkpoints, Ranks()).progress.step == 3
    assert "another version wrote it" in capsys.readouterr().out
    with pytest.raises(DamagedCheckpoint, match="another version wrote it"):
        choose_start(asks(f"runner.resume_dir={checkpoints / 'global_step_4'}").runner, checkpoints)


def test_an_older_checkpoint_must_be_of_the_same_run_too(checkpoints):
    save(checkpoints, (4,), {**IDENTITY, "lr": 2.0})
    with pytest.raises(ConfigError, match=r"lr: 1\.0 -> 2\.0"):
        resume(asks(), checkpoints, Ranks(damaged=("global_step_4",)), {**IDENTITY, "lr": 2.0})


def test_weights_start_a_new_run_once_and_then_it_resumes_its_own(checkpoints, tmp_path, capsys):
    own = tmp_path / "own"
    config = asks("runner.resume_mode=weights", f"runner.resume_dir={checkpoints / 'global_step_2'}")
    ranks = Ranks()
    start = resume(config, own, ranks)
    assert (start.progress, start.committed_step) == (Progress(), None)
    assert ranks.asked == [("load_weights", "global_step_2", "full")]
    assert "a new run, with the model weights of step 2" in capsys.readouterr().out

    began = {**IDENTITY, INITIAL: initial_weights(choose_start(config.runner, own))}
    save(own, (1, 2), began)
    again = resume(config, own, Ranks(damaged=("global_step_2",)), began)
    assert again.committed_step == 1
    assert "and resumes from the newest one" in capsys.readouterr().out

    with pytest.raises(DamagedCheckpoint):
        resume(config, tmp_path / "third", Ranks(damaged=("global_step_2",)))


def test_the_origin_of_the_weights_is_part_of_the_run(checkpoints, tmp_path):
    of = {
        step: initial_weights(choose_start(begins_with(checkpoints, step).runner, tmp_path / "new")) for step in (1, 2)
    }
    assert of[1] is not None and of[2] is not None and of[1] != of[2]
    assert initial_weights(choose_start(asks().runner, checkpoints)) is None
    own = save(tmp_path / "own", (1,), {**IDENTITY, INITIAL: of[1]})
    start = choose_start(asks().runner, own)
    for unknown_or_same in (None, of[1]):
        assert check_identity(start, {**IDENTITY, INITIAL: unknown_or_same}, []) == start
    with pytest.raises(ConfigError, match=r"actor\.model \(initial weights\)"):
        check_identity(start, {**IDENTITY, INITIAL: of[2]}, [])
    assert carried_on({INITIAL: of[1]}, IDENTITY)[INITIAL] == of[1]
    assert carried_on({}, {**IDENTITY, INITIAL: of[2]})[INITIAL] == of[2]


def begins_with(checkpoints: Path, step: int | str) -> Config:
    name = step if isinstance(step, str) else f"global_step_{step}"
    return asks("runner.resume_mode=weights", f"runner.resume_dir={checkpoints / name}")


ROUNDS = {"actor.training_backend": "one that sums in the order of the ranks"}


def report_of(sections: dict[str, list[int]], *, rng_restored: bool, identity: dict | None = None) -> LoadReport:
    world_size = len(sections.get("actor", [0]))
    manifest = manifests.Manifest(
        step=3,
        world_size=world_size,
        files={},
        sections=sections if len(sections) > 1 else {},
        info={"compute": "cpu", "identity": identity or {}},
    )
    return LoadReport(
        path=Path("global_step_3"), manifest=manifest, load_seconds=0.1, rng_restored=rng_restored, num_bytes=1
    )


@pytest.mark.parametrize(
    ("now", "differs", "said"),
    [
        ({"actor": 2, "critic": 1}, [], ""),
        ({"actor": 2, "critic": 3}, ["critic ranks: 1 -> 3"], "saved by 2 actor ranks, 1 critic ranks, now 2, 3: "),
        ({"actor": 1, "critic": 1}, ["actor ranks: 2 -> 1"], "saved by 2 actor ranks, 1 critic ranks, now 1, 1: "),
        (
            {"actor": 1, "critic": 2},
            ["actor ranks: 2 -> 1", "critic ranks: 1 -> 2"],
            "saved by 2 actor ranks, 1 critic ranks, now 1, 2: ",
        ),
    ],
)
def test_another_number_of_ranks_is_said_of_the_model_that_has_it(capsys, now, differs, said):
    report = report_of({"actor": [0, 1], "critic": [2]}, rng_restored=not differs, identity=ROUNDS)
    assert what_differs(report, now, "cpu") == differs
    log_what_differs(report, now, "cpu")
    printed = capsys.readouterr().out
    assert said in printed and bool(printed) == bool(said) == ("sums are taken in another order" in printed)
    exact = report_of({"actor": [0, 1], "critic": [2]}, rng_restored=not differs)
    assert what_differs(exact, now, "cpu") == []
    log_what_differs(exact, now, "cpu")
    printed = capsys.readouterr().out
    assert said in printed and bool(printed) == bool(said) == ("bit-equal" in printed) and "!!" not in printed


def test_a_checkpoint_without_sections_is_of_the_actor_alone():
    report = report_of({"actor": [0]}, rng_restored=False, identity=ROUNDS)
    assert what_differs(report, {"actor": 2}, "cuda") == ["actor ranks: 1 -> 2", "devices: cpu -> cuda"]
    assert what_differs(report, {"actor": 1}, "cpu") == ["RNG state not restored"]
    exact = report_of({"actor": [0]}, rng_restored=False)
    assert what_differs(exact, {"actor": 2}, "cuda") == ["devices: cpu -> cuda"]


def test_ranks_of_each_model_are_part_of_the_recipe_where_they_count():
    made_with = [{"actor": 2}, {"actor": 2, "critic": 1}, {"actor": 1, "critic": 2}, {"actor": 3}]
    fsdp1 = {"critic.fsdp_config.strategy": "fsdp"}
    for identity, number in ((IDENTITY, 1), ({**IDENTITY, **ROUNDS}, 4), ({**IDENTITY, **fsdp1}, 4)):
        assert len({recipe(identity, sizes, "cpu") for sizes in made_with}) == number
        assert recipe(identity, {"actor": 2, "critic": 1}, "cpu") == recipe(identity, dict(made_with[1]), "cpu")


class Files:
    """A state in a layout of its own, as Megatron's."""

    def files(self, step: int) -> dict[str, object]:
        return {"latest_checkpointed_iteration.txt": str(step).encode()}

    def load(self, names: object, read: object, *, weights_only: bool) -> bool:
        raise AssertionError("is only saved")


def test_the_other_backend_is_refused_with_the_converter_before_anything_else(checkpoints, tmp_path):
    start = choose_start(asks().runner, checkpoints)
    with pytest.raises(SectionMismatch, match=r"convert_dcp_to_megatron\.py --dcp_path .*global_step_3"):
        check_identity(start, {**IDENTITY, "actor.training_backend": "megatron", "lr": 9.0}, [])
    data = {"progress": Progress(step=4).state(), "observability": {"wandb_run_id": None}}
    Checkpointer(tmp_path / "other").save(4, Files(), data=data, info={"identity": IDENTITY})
    start = choose_start(asks().runner, tmp_path / "other")
    with pytest.raises(SectionMismatch, match=r"convert_megatron_to_dcp\.py --megatron_path .*global_step_4"):
        check_identity(start, {**IDENTITY, "actor.training_backend": "fsdp"}, [])


def test_another_programs_checkpoint_is_resumed_by_consent_only(tmp_path, capsys):
    info = {"lacks_rng": True, "written_by": "RLinf"}
    Checkpointer(tmp_path).save(50, {"model": {"w": torch.zeros(3)}}, info=info)
    start = choose_start(asks().runner, tmp_path)
    assert (start.progress.step, start.progress.cursor, start.hub_state["last_step"]) == (50, 0, 50)
    log_missing_rows(start, tmp_path / "metrics.jsonl", tmp_path)
    assert "missing" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"checkpoint \(written by\): RLinf") as caught:
        check_identity(start, IDENTITY, [])
    name = "checkpoint (written by)"
    assert f"\"runner.resume_allow_changes=['{name}']\"" in str(caught.value)
    allowed = check_identity(start, IDENTITY, [name])
    assert allowed.committed_step == 50 and name in allowed.changes[0]
    report = LoadReport(
        path=tmp_path, manifest=start.selection.manifest, load_seconds=0.1, rng_restored=False, num_bytes=1
    )
    capsys.readouterr()
    log_what_differs(report, {"actor": 1}, "cpu")
    printed = capsys.readouterr().out
    assert "has no RNG state" in printed and "RLinf wrote it: data and counters" in printed


def test_a_link_to_the_weights_may_move_on_or_go(checkpoints, tmp_path):
    """Those weights are never read again: what the run began with stays in its identity."""
    link, own = checkpoints / "latest", tmp_path / "own"
    link.symlink_to("global_step_1")
    config = begins_with(checkpoints, "latest")
    began = {**IDENTITY, INITIAL: initial_weights(choose_start(config.runner, own))}
    save(own, (1,), began)
    for target in ("global_step_2", None):
        link.unlink()
        if target is not None:
            link.symlink_to(target)
        start = choose_start(config.runner, own)
        now = {**IDENTITY, INITIAL: initial_weights(start)}
        assert check_identity(start, now, config.runner.resume_allow_changes).committed_step == 1
        assert carried_on(began, now) == began
