"""CheckpointManager: a script with model, optimizer and metadata resumes bit-exactly."""

import itertools
import math
import random
import shutil
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rlinf_lite import faults
from rlinf_lite.checkpoint import (
    Checkpointer,
    DamagedCheckpoint,
    KeepBest,
    NoCheckpoint,
    Retention,
    SaveError,
    StateMismatch,
    layout,
)
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.formats.read_state import read_tensors, tensor_names
from rlinf_lite.checkpoint.torch_api.manager import CheckpointManager

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "train_with_checkpoints.py"


def make_both(seed=0, make_optimizer=torch.optim.AdamW, width=8, **settings):
    torch.manual_seed(seed)
    layers = nn.Linear(4, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.3), nn.Linear(width, 2)
    model = nn.Sequential(*layers)
    return model, make_optimizer(model.parameters(), **{"lr": 0.05, **settings})


def train(model, optimizer, num_steps):
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(torch.randn(6, 4)).square().mean().backward()
        optimizer.step()


def everything(model, optimizer):
    """All tensors by name, as copies."""
    found = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    for name, param in model.named_parameters():
        state = optimizer.state.get(param, {})
        found |= {f"optim.{name}.{key}": value.clone() for key, value in state.items()}
    return found


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name].dtype != theirs[name].dtype] == []
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def flip_a_bit(path):
    file = path / "actor" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


# -- bit-exact resume

OPTIMIZERS = {
    "SGD": {},
    "SGD momentum": {"momentum": 0.9, "nesterov": True},
    "Adam": {"foreach": False},
    "Adam foreach": {"foreach": True, "amsgrad": True},
    "AdamW fused": {"fused": True},
    "Adagrad": {"lr_decay": 0.1, "initial_accumulator_value": 0.5},
    "RMSprop": {"centered": True, "momentum": 0.9},
    "NAdam": {},
    "ASGD": {"t0": 1.0},
    "Rprop": {},
    "Adafactor": {},
    "LBFGS": {},
}

PROGRAM = """
    import torch
    from torch import nn
    from rlinf_lite.checkpoint.torch_api.manager import CheckpointManager

    finals = {}
    for name, settings, mode in RUNS:
        torch.manual_seed(SEED)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))
        optimizer = getattr(torch.optim, name.split()[0])(model.parameters(), lr=0.05, **settings)
        manager = CheckpointManager(f"{ROOT}/{name}/{mode}", mode=mode)
        done = (manager.load(model, optimizer) or {"steps": 0})["steps"]
        for _ in range(done, STEPS):
            inputs, noise = torch.randn(6, 4), torch.get_rng_state()

            def closure():
                torch.set_rng_state(noise)  # LBFGS asks several times
                optimizer.zero_grad()
                loss = model(inputs).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
        manager.save(model, optimizer, {"steps": STEPS})
        manager.finish()
        finals[f"{name}, {mode}"] = {**model.state_dict(), "drawn": torch.rand(3)}
    torch.save(finals, OUT)
"""


def test_six_steps_are_three_and_three_in_a_new_process(run_script, tmp_path):
    modes = itertools.cycle(("sync", "async"))
    runs = [(name, settings, next(modes)) for name, settings in OPTIMIZERS.items()]

    def given(steps, directory, seed):
        root, out = str(tmp_path / directory), str(tmp_path / f"{directory}{steps}.pt")
        return {"RUNS": runs, "SEED": seed, "STEPS": steps, "ROOT": root, "OUT": out}

    for steps, directory in ((6, "straight"), (3, "resumed")):
        exec(textwrap.dedent(PROGRAM), given(steps, directory, seed=0))
    assert run_script(PROGRAM, **given(6, "resumed", seed=99)) == 0
    straight, halfway, resumed = (torch.load(tmp_path / f"{n}.pt") for n in ("straight6", "resumed3", "resumed6"))
    assert len(straight) == len(runs)
    for run, final in straight.items():
        assert not torch.equal(final["0.weight"], halfway[run]["0.weight"]), run
        assert [name for name in final if not torch.equal(final[name], resumed[run][name])] == [], run


def test_the_example_resumes_where_it_stopped(tmp_path, run_forked):
    def arguments(steps, directory):
        return [EXAMPLE, "--steps", str(steps), "--save-dir", str(tmp_path / directory)]

    def printed(done):
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    straight = printed(run_forked(*arguments(40, "straight")))
    first = printed(run_forked(*arguments(25, "stopped")))
    second = printed(run_forked(*arguments(40, "stopped")))
    assert first[0] == straight[0] == "starts after step 0"
    assert second[0] == "starts after step 25"
    assert second[-1] == straight[-1] != first[-1]
    unseeded = ("rng.rank0.python", "rng.rank0.numpy")
    ends = [
        read_tensors(tmp_path / directory / "global_step_40" / "actor", lambda name: not name.startswith(unseeded))
        for directory in ("straight", "stopped")
    ]
    assert {"model.0.weight", "optim.3.bias.exp_avg", "rng.rank0.torch"} < ends[0].keys()
    assert_same(*ends)
    assert len(EXAMPLE.read_text().splitlines()) <= 40


def test_state_and_hyperparameters_come_back_into_fresh_objects(root):
    model, optimizer = make_both(foreach=True, betas=(0.8, 0.9))
    train(model, optimizer, 3)
    optimizer.param_groups[0]["lr"] = 0.007
    manager = CheckpointManager(root)
    manager.save(model, optimizer, {})
    other, its_optimizer = make_both(1)
    manager.load(other, its_optimizer)
    assert_same(everything(model, optimizer), everything(other, its_optimizer))
    assert its_optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    theirs = {key: value for key, value in its_optimizer.param_groups[0].items() if key != "params"}
    assert theirs == {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    assert theirs["lr"] == 0.007
    assert [id(param) for param in its_optimizer.param_groups[0]["params"]] == [id(p) for p in other.parameters()]


def test_an_optimizer_that_has_stepped_is_put_back_too(root):
    """Also to before its first step: what it has gathered since is gone."""
    model, optimizer = make_both()
    manager = CheckpointManager(root)
    expected = []
    for step in range(2):
        manager.save(model, optimizer, {}, step=step)
        expected.append(everything(model, optimizer))
        train(model, optimizer, 2)
    for step in (1, 0, 1):
        manager.load(model, optimizer, root / f"global_step_{step}")
        assert_same(everything(model, optimizer), expected[step])
        train(model, optimizer, 1)


def test_optimizer_state_is_loaded_in_place(root):
    """Not into a second set, for which there may be no memory."""
    model, optimizer = make_both()
    train(model, optimizer, 1)
    manager = CheckpointManager(root)
    manager.save(model, optimizer, {})
    average = optimizer.state[model[0].weight]["exp_avg"]
    manager.load(model, optimizer)
    assert optimizer.state[model[0].weight]["exp_avg"] is average


def test_a_schedule_in_the_metadata_continues(root):
    def make():
        model, optimizer = make_both(make_optimizer=torch.optim.SGD, momentum=0.9)
        return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)

    def run(model, optimizer, schedule, num_steps):
        for _ in range(num_steps):
            train(model, optimizer, 1)
            schedule.step()

    manager = CheckpointManager(root)
    first = make()
    run(*first, 4)
    manager.save(first[0], first[1], {"schedule": first[2].state_dict()})
    run(*first, 4)
    second = make()
    second[2].load_state_dict(manager.load(second[0], second[1])["schedule"])
    run(*second, 4)
    assert_same(everything(*first[:2]), everything(*second[:2]))
    assert first[1].param_groups[0]["lr"] == second[1].param_groups[0]["lr"] != 0.05


def test_a_learning_rate_that_is_a_tensor_stays_the_same_tensor(root):
    model, optimizer = make_both(lr=torch.tensor(0.5))
    manager = CheckpointManager(root)
    manager.save(model, optimizer, {})
    rate = optimizer.param_groups[0]["lr"]
    rate.fill_(0.1)
    manager.load(model, optimizer)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == 0.5


def test_parameter_groups_keep_their_own_settings(root):
    def make(decay):
        model, _ = make_both()
        first, *rest = model.parameters()
        return model, torch.optim.AdamW([{"params": [first], "weight_decay": decay}, {"params": rest}], lr=0.05)

    model, optimizer = make(0.5)
    train(model, optimizer, 1)
    manager = CheckpointManager(root)
    manager.save(model, optimizer, {})
    other, its_optimizer = make(0.0)
    manager.load(other, its_optimizer)
    assert [group["weight_decay"] for group in its_optimizer.param_groups] == [0.5, 0.01]
    assert_same(everything(model, optimizer), everything(other, its_optimizer))
    with pytest.raises(StateMismatch, match="has 2 parameter groups, this one 1"):
        manager.load(*make_both())


class Tied(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.embed = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 4, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def test_tied_parameters_are_saved_once_and_stay_tied(root):
    model = Tied()
    optimizer = torch.optim.Adam(model.parameters())
    model.head(model.embed(torch.randn(2, 4))).sum().backward()
    optimizer.step()
    manager = CheckpointManager(root)
    path = manager.save(model, optimizer, {}).path
    assert [name for name in tensor_names(path / "actor") if name.startswith("model")] == ["model.embed.weight"]
    assert manifests.read(path).info["tied"] == {"head.weight": "embed.weight"}
    other = Tied()
    its_optimizer = torch.optim.Adam(other.parameters())
    manager.load(other, its_optimizer)
    assert other.head.weight is other.embed.weight
    assert_same(everything(model, optimizer), everything(other, its_optimizer))
    with pytest.raises(StateMismatch, match=r"missing: model\.head\.weight"):
        manager.load(Tied(tied=False))


class Counting(nn.Linear):
    """Has state that is no tensor."""

    seen = 0

    def get_extra_state(self):
        return {"seen": self.seen}

    def set_extra_state(self, state):
        self.seen = state["seen"]


def test_extra_state_of_modules_comes_back(root):
    model = nn.Sequential(Counting(2, 2))
    model[0].seen = 5
    manager = CheckpointManager(root)
    manager.save(model, None, {})
    other = nn.Sequential(Counting(2, 2))
    manager.load(other)
    assert other[0].seen == 5
    with pytest.raises(StateMismatch, match=r"only one of checkpoint and model has 0\._extra_state"):
        manager.load(nn.Sequential(nn.Linear(2, 2)))


# -- metadata and steps


def test_metadata_comes_back_equal(root):
    metadata = {
        "epoch": 3,
        "rewards": [0.1, 1e-300, -2],
        "win_rate": 1 / 3,
        "best": None,
        "done": False,
        "names": {"ö": "\ud800", "": []},
        "large": 10**30,
        "numpy": np.float64(0.1),
    }
    model, optimizer = make_both()
    manager = CheckpointManager(root)
    manager.save(model, optimizer, metadata)
    assert manager.load(model, optimizer) == metadata
    assert manager.load(model) == metadata
    manager.save(model, optimizer, {"reward": math.nan})
    assert math.isnan(manager.load(model, optimizer)["reward"])


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"reward": torch.tensor(1.0)}, r"metadata\['reward'\] is a Tensor"),
        ({"a": {"b": [0, (1, 2)]}}, r"metadata\['a'\]\['b'\]\[1\] is a tuple"),
        ({"rate": np.float32(1)}, r"metadata\['rate'\] is a float32"),
        ({"wins": {3: 1}}, r"metadata\['wins'\] has the key 3, a int"),
        ([1], "metadata is a list"),
    ],
)
def test_metadata_that_would_not_come_back_is_refused_by_name(root, metadata, named):
    with pytest.raises(TypeError, match=named):
        CheckpointManager(root).save(*make_both(), metadata)
    assert not root.exists()


def test_the_step_is_given_or_found_in_the_metadata_or_the_next(root):
    model, optimizer = make_both()
    manager = CheckpointManager(root)
    cases = [
        (None, {"epoch": 7}, 1),
        (None, {}, 2),
        (0, {"step": 9}, 0),
        (None, {"step": 9, "global_step": 8}, 9),
        (None, {"step": "nine", "global_step": 20}, 20),
        (None, {"step": True}, 21),
        (None, {"step": 9}, 9),
    ]
    for given, metadata, expected in cases:
        report = manager.save(model, optimizer, metadata, step=given)
        assert (report.step, report.path) == (expected, root / f"global_step_{expected}")
    assert report.superseded.is_dir()
    assert manager.get_latest_checkpoint() == root / "global_step_21"
    for bad in (-1, 1.0, True):
        with pytest.raises(ValueError, match="step="):
            manager.save(model, optimizer, {}, step=bad)


def test_what_is_kept_goes_by_numbers_in_the_metadata(root):
    keep = Retention(keep_last=1, keep_best=KeepBest(metric="win_rate"))
    manager = CheckpointManager(root, keep=keep)
    for win_rate in (0.1, 0.7, math.inf, 0.4, 0.3):
        manager.save(*make_both(), {"win_rate": win_rate, "note": "x"})
    assert [path.name for path in layout.committed(root)] == ["global_step_5", "global_step_2"]


# -- what load chooses and refuses


def test_an_empty_directory_gives_none_and_changes_nothing(root):
    model, optimizer = make_both()
    before = everything(model, optimizer)
    manager = CheckpointManager(root)
    assert manager.load(model, optimizer) is None
    assert manager.get_latest_checkpoint() is None
    assert_same(everything(model, optimizer), before)
    assert not root.exists()


def test_weights_alone_leave_optimizer_and_rng_state(root):
    model, optimizer = make_both()
    train(model, optimizer, 2)
    manager = CheckpointManager(root)
    manager.save(model, optimizer, {"epoch": 1})
    other, its_optimizer = make_both(1)
    train(other, its_optimizer, 1)
    moments = {name: value for name, value in everything(other, its_optimizer).items() if name.startswith("optim")}
    torch.manual_seed(3), random.seed(3)
    assert manager.load(other) == {"epoch": 1}
    assert_same(dict(model.state_dict()), dict(other.state_dict()))
    after = everything(other, its_optimizer)
    assert_same(moments, {name: value for name, value in after.items() if name.startswith("optim")})
    drawn = torch.rand(2), random.random()
    torch.manual_seed(3), random.seed(3)
    assert torch.equal(drawn[0], torch.rand(2))
    assert drawn[1] == random.random()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_best_that_no_checkpoint_can_be_keeps_all_of_them_and_is_warned_of_once(root, mode):
    model, optimizer = make_both()
    manager = CheckpointManager(root, keep=Retention(keep_best=KeepBest(metric="acuracy")), mode=mode)
    with pytest.warns(UserWarning) as caught:
        for step in range(1, 5):
            manager.save(model, optimizer, {"step": step, "accuracy": step / 4})
        manager.finish()
    assert [layout.step_of(path) for path in layout.committed(root)] == [4, 3, 2, 1]
    texts = [str(warning.message) for warning in caught if warning.category is UserWarning]
    (told,) = [text for text in texts if "keep_best" in text]  # what other tests left may warn, too
    assert told.startswith(f"{root}: keep_best: none of the 2 checkpoints has a number for acuracy, so")


def test_damaged_checkpoints_are_stepped_over_and_named(root):
    model, optimizer = make_both()
    manager = CheckpointManager(root)
    for step in (1, 2, 3):
        train(model, optimizer, 1)
        manager.save(model, optimizer, {"step": step})
    flip_a_bit(root / "global_step_3")
    (root / "global_step_2" / "manifest.json").unlink()
    other, its_optimizer = make_both(1)
    with pytest.warns(UserWarning) as caught:
        assert manager.load(other, its_optimizer) == {"step": 1}
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2
    assert "global_step_3/actor/__0_0.distcp: its blake3" in texts[0]
    assert "global_step_2: no manifest.json" in texts[1]
    assert {warning.filename for warning in caught} == {__file__}

    before = everything(other, its_optimizer)
    flip_a_bit(root / "global_step_1")
    with pytest.raises(DamagedCheckpoint, match="none of the 3 checkpoints"):
        manager.load(other, its_optimizer)
    with pytest.raises(DamagedCheckpoint, match="blake3"):
        manager.load(other, its_optimizer, root / "global_step_1")
    with pytest.raises(NoCheckpoint, match="global_step_7"):
        manager.load(other, its_optimizer, root / "global_step_7")
    assert_same(everything(other, its_optimizer), before)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: make_both(1, torch.optim.Adam), "written with AdamW, this is Adam"),
        (lambda: make_both(1, width=9), "is float32"),
        (lambda: (m := make_both(1)[0], torch.optim.AdamW(m[0].parameters())), "holds other parameters; .* 1.bias"),
    ],
)
def test_other_models_and_optimizers_are_refused_untouched(root, make, reason):
    model, optimizer = make_both()
    train(model, optimizer, 1)
    manager = CheckpointManager(root)
    manager.save(model, optimizer, {})
    other, its_optimizer = make()
    before = everything(other, its_optimizer)
    with pytest.raises(StateMismatch, match=rf"global_step_1.*{reason}"):
        manager.load(other, its_optimizer)
    assert_same(everything(other, its_optimizer), before)
    assert not its_optimizer.state


def test_an_optimizer_of_another_model_is_refused(root):
    model, _ = make_both()
    _, foreign = make_both()
    manager = CheckpointManager(root)
    with pytest.raises(ValueError, match=r"param_groups\[0\] holds a parameter of shape \[8, 4\] that the model"):
        manager.save(model, foreign, {})
    manager.save(*make_both(), {})
    with pytest.raises(ValueError, match="that the model does not have"):
        manager.load(model, foreign)


def test_a_checkpoint_without_a_manager_s_optimizer_gives_its_weights(root):
    model, _ = make_both()
    Checkpointer(root).save(4, {"model": model, "lr_scheduler": {"num_updates": torch.tensor(3)}}, data={"cursor": 1})
    other, its_optimizer = make_both(1)
    manager = CheckpointManager(root)
    with pytest.raises(StateMismatch, match=r"global_step_4: holds no optimizer .* its weights with load\(model\)"):
        manager.load(other, its_optimizer)
    assert manager.load(other) == {"step": 4}
    assert_same(dict(model.state_dict()), dict(other.state_dict()))


@pytest.mark.parametrize(
    "data",
    [
        {"optimizer": [], "metadata": {}},
        {"optimizer": {"type": "AdamW", "groups": [{}], "state": {}}},
        {"optimizer": {"type": "AdamW", "groups": [{"params": 3}], "state": {}}},
        {"optimizer": {"type": "AdamW", "groups": [], "state": {"0.weight": 3}}},
        {"optimizer": None, "model": 1},
        {"optimizer": None, "metadata": [1]},
    ],
)
def test_data_of_another_form_is_refused(root, data):
    model, optimizer = make_both()
    Checkpointer(root).save(1, {"model": model}, data=data)
    with pytest.raises(DamagedCheckpoint, match="global_step_1"):
        CheckpointManager(root).load(model, optimizer)


@pytest.mark.parametrize(("setting", "value"), [("mode", "later"), ("verify", "yes")])
def test_settings_are_checked(root, setting, value):
    with pytest.raises(ValueError, match=f"{setting}='{value}': one of"):
        CheckpointManager(root, **{setting: value})


def test_an_object_store_does_as_well():
    url = "memory://manager/checkpoints"
    model, optimizer = make_both()
    with CheckpointManager(url, mode="async", keep=Retention(keep_last=1)) as manager:
        for step in range(2):
            train(model, optimizer, 1)
            manager.save(model, optimizer, {"step": step})
    other, its_optimizer = make_both(1)
    manager = CheckpointManager(url)
    assert str(manager.get_latest_checkpoint()) == f"{url}/global_step_1"
    assert manager.load(other, its_optimizer) == {"step": 1}
    assert_same(everything(model, optimizer), everything(other, its_optimizer))


# -- async


@pytest.fixture
def gate(monkeypatch):
    """Saves reach their first tensor only when this is set."""
    opened, reach = threading.Event(), faults.reach

    def wait(phase, **where):
        if phase == "save.write":
            assert opened.wait(30)
        reach(phase, **where)

    monkeypatch.setattr(faults, "reach", wait)
    yield opened
    opened.set()


def test_an_async_save_holds_the_state_of_its_instant(root, gate):
    """Training continues while the state is being read: only parameters and optimizer state wait for the save."""
    model, optimizer = make_both(width=2000)
    model.append(nn.Linear(2, 4000).requires_grad_(False))  # in no optimizer: as a target network
    optimizer.param_groups[0]["params"] = [param for param in model.parameters() if param.requires_grad]
    train(model, optimizer, 2)
    expected = everything(model, optimizer)
    manager = CheckpointManager(root, mode="async")
    assert manager.save(model, optimizer, {"epoch": 1}) is None
    model(torch.randn(6, 4))
    model[-1].weight.data.fill_(7.0)
    optimizer.param_groups[0]["lr"] = 0.5
    assert not torch.equal(model[1].running_mean, expected["model.1.running_mean"])
    threading.Timer(0.2, gate.set).start()
    train(model, optimizer, 1)
    report = manager.finish()
    assert report.stall_seconds >= 0.1
    assert manager.finish() is None
    assert not torch.equal(model[0].weight, expected["model.0.weight"])

    other, its_optimizer = make_both(1, width=2000)
    other.append(nn.Linear(2, 4000).requires_grad_(False))
    assert CheckpointManager(root).load(other, its_optimizer) == {"epoch": 1}
    assert_same(everything(other, its_optimizer), expected)
    assert its_optimizer.param_groups[0]["lr"] == 0.05


def test_one_hook_per_optimizer_and_reports_one_save_later(root):
    model, optimizer = make_both()
    with CheckpointManager(root, mode="async") as manager:
        reports = [manager.save(model, optimizer, {"step": step}) for step in (1, 2, 3)]
    assert [report and report.step for report in reports] == [None, 1, 2]
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    assert manager.get_latest_checkpoint() == root / "global_step_3"


def test_a_failed_async_save_is_raised_by_the_next_call(root, set_faults):
    model, optimizer = make_both()
    set_faults(*({"phase": "save.write", "step": step, "action": "ENOSPC"} for step in (1, 2, 3, 4)))
    manager = CheckpointManager(root, mode="async")
    told = r"global_step_{} was not saved: No space left on device"
    manager.save(model, optimizer, {"step": 1})
    with pytest.raises(SaveError, match=told.format(1)):
        manager.save(model, optimizer, {"step": 5})
    manager.save(model, optimizer, {"step": 2})
    with pytest.raises(SaveError, match=told.format(2)):
        manager.finish()
    manager.save(model, optimizer, {"step": 6})
    with pytest.raises(SaveError, match=told.format(3)), manager:
        manager.save(model, optimizer, {"step": 3})
    with pytest.raises(KeyError) as caught, manager:
        manager.save(model, optimizer, {"step": 4})
        raise KeyError("of the script")
    assert told.format(4).replace(r"\d", "4") in caught.value.__notes__[0]
    assert [path.name for path in layout.committed(root)] == ["global_step_6"]


FORGETFUL = """
import sys, torch
from rlinf_lite.checkpoint.torch_api.manager import CheckpointManager
model = torch.nn.Linear(1000, 1000)
CheckpointManager(sys.argv[1], mode="async").save(model, torch.optim.Adam(model.parameters()), {})
"""


def test_a_script_that_does_not_call_finish_has_its_checkpoint(root, run_forked):
    assert run_forked("-c", FORGETFUL, str(root)).returncode == 0
    assert [path.name for path in layout.committed(root)] == ["global_step_1"]
    assert layout.leftovers(root) == []


def test_load_waits_for_the_save_in_flight(root):
    model, optimizer = make_both()
    train(model, optimizer, 1)
    expected = everything(model, optimizer)
    manager = CheckpointManager(root, mode="async")
    manager.save(model, optimizer, {"step": 3})
    train(model, optimizer, 1)
    assert manager.load(model, optimizer) == {"step": 3}
    assert_same(everything(model, optimizer), expected)


def test_a_moved_checkpoint_loads_from_where_it_is(root, tmp_path):
    model, optimizer = make_both()
    path = CheckpointManager(root).save(model, optimizer, {"a": 1}).path
    shutil.move(path, tmp_path / "elsewhere")
    assert CheckpointManager(tmp_path / "new").load(model, optimizer, str(tmp_path / "elsewhere")) == {"a": 1}


def test_the_first_save_removes_what_a_killed_one_left(tmp_path):
    model, optimizer = nn.Linear(2, 2), None
    (tmp_path / "global_step_5.tmp-0a1b2c3d" / "actor").mkdir(parents=True)
    manager = CheckpointManager(tmp_path)
    assert manager.load(model, optimizer) is None
    assert (tmp_path / "global_step_5.tmp-0a1b2c3d").exists()
    manager.save(model, optimizer, {})
    assert [path.name for path in tmp_path.iterdir()] == ["global_step_1"]
