"""Parameters in fp16 with a scaled loss: as Megatron-core scales it, and what that is for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlinf_lite.config import MegatronConfig
from rlinf_lite.training.megatron.scaler import LossScaler
from rlinf_lite.types import Column

pytestmark = pytest.mark.xdist_group("megatron")  # one process imports megatron-core

SCALE = "actor.megatron.loss_scale"
FP16 = {"actor.model.precision": "fp16", "actor.optim.clip_grad": 0.0}


@pytest.mark.filterwarnings("ignore")  # of Megatron's optimizers, on import
@pytest.mark.parametrize("window", [1000, 5])
def test_the_scale_follows_overflows_as_megatrons_does(window):
    from megatron.core.optimizer.grad_scaler import DynamicGradScaler  # takes seconds

    dynamic = MegatronConfig(loss_scale_window=window)
    ours, theirs = LossScaler.of(dynamic), DynamicGradScaler.__new__(DynamicGradScaler)  # which would ask for a GPU
    numbers = {"_scale": [2.0**32], "min_scale": [1.0], "growth_factor": [2.0], "backoff_factor": [0.5]}
    for name, value in numbers.items():
        setattr(theirs, name, torch.tensor(value))
    theirs.growth_interval, theirs.hysteresis, theirs._growth_tracker, theirs._hysteresis_tracker = window, 2, 0, 2
    for step in range(9 * window):
        overflowed = step < 40 or step in (3000, 3001, 3500, 6100) or step > 9 * window - 20
        ours.update(overflowed=overflowed)
        theirs.update(overflowed)
        state, wanted = ours.state(), theirs.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(torch.as_tensor(state[name]), torch.as_tensor(wanted[name])) for name in wanted)
        if step == 5 * window:
            ours = LossScaler.of(dynamic)
            ours.load(wanted)
    constant = LossScaler.of(MegatronConfig(loss_scale=128.0))
    constant.update(overflowed=True)
    constant.load(ours.state())
    assert (constant.scale, constant.state()) == (128.0, {})


def lighter(units, factor):
    """With losses that are smaller by a factor."""
    return [
        replace(unit, columns={**unit.columns, Column.ADVANTAGE: unit.columns[Column.ADVANTAGE] * factor})
        for unit in units
    ]


@pytest.mark.soak  # the scale itself: test_the_scale_follows_overflows_as_megatrons_does
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_small_gradients_are_kept(ranks, model_dirs, make_config, made_up, reference, sequence_parallel):
    """In fp16 nothing is between 0 and 6e-8. With a scaled loss gradients are what they are in float64, to fp16."""
    groups, units, weight = made_up
    changes = {**FP16, "actor.megatron.sequence_parallel": sequence_parallel}
    small = 2.0**-17
    wanted = reference(model_dirs["qwen2"], make_config(2, changes), groups, weight * small, num_steps=1)
    errors = {}
    for scale in (1.0, 2.0**17):
        given = {"model_dir": model_dirs["qwen2"], "units": lighter(units, small), "num_steps": 1}
        found = ranks.run(4, "pass_and_step", **given, config=make_config(2, {**changes, SCALE: scale}))
        logprobs = {index: values for rank in found for index, values in rank["logprobs"].items()}
        joined = torch.cat([torch.from_numpy(logprobs[unit.index]) for unit in units]).double()
        torch.testing.assert_close(joined, wanted["logprobs"], rtol=0, atol=0.02)
        gradients = found[0]["gradients"]
        errors[scale] = max(
            float((gradients[name].double() / scale - gradient).norm() / gradient.norm())
            for name, gradient in wanted["gradients"].items()
        )
        if scale > 1:
            assert found[0]["norms"] == pytest.approx(wanted["norms"], rel=0.01), "of gradients that are not scaled"
    assert errors[2.0**17] < 0.01 < 0.1 < errors[1.0], errors


def test_a_step_that_overflows_is_skipped(ranks, model_dirs, make_config, made_up):
    given = {"model_dir": model_dirs["qwen2"], "units": made_up[1]}
    for rank in ranks.run(4, "scaled_steps", **given, num_steps=3, config=make_config(2, {**FP16, SCALE: 2.0**32})):
        assert [step["skipped"] for step in rank] == [True] * 3 and not any(step["changed"] for step in rank)
        assert [step["updates"] for step in rank] == [(1, 0), (2, 0), (3, 0)]
        assert {step["scale"] for step in rank} == {2.0**32}
    dynamic = ranks.run(4, "scaled_steps", **given, num_steps=22, config=make_config(2, FP16))
    assert all([step["scale"] for step in rank] == [step["scale"] for step in dynamic[0]] for rank in dynamic)
    for rank in dynamic:
        skipped = [step["skipped"] for step in rank]
        first = skipped.index(False)
        assert 10 < first < 20 and not any(skipped[first:])
        assert [step["scale"] for step in rank[:first]] == [2.0**32, *(2.0 ** (31 - n) for n in range(first - 1))]
        assert [step["changed"] for step in rank] == [not skip for skip in skipped]
        assert rank[-1]["updates"] == (22, 22 - first)
