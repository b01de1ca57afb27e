"""Checkpoints that agree with their manifest but hold an RNG state that no save writes: refused, naming the field."""

from __future__ import annotations

import pytest
import torch

from rlinf_lite import rng
from rlinf_lite.checkpoint import Checkpointer, DamagedCheckpoint, NoCheckpoint


def broken(state: rng.RngState, part: str, value: torch.Tensor | None) -> rng.RngState:
    changed = {**state, part: value}
    return {name: tensor for name, tensor in changed.items() if tensor is not None}


def changed(state: rng.RngState, part: str, index: int, value: int) -> rng.RngState:
    tensor = state[part].clone()
    tensor[index] = value
    return {**state, part: tensor}


NONSENSE = {
    "python too short": lambda state: broken(state, "python", state["python"][:-1]),
    "python of another version": lambda state: changed(state, "python", 0, 9),
    "python beyond its words": lambda state: changed(state, "python", -1, 10**6),
    "python negative": lambda state: changed(state, "python", 5, -1),
    "numpy too long": lambda state: broken(state, "numpy", torch.zeros(700, dtype=torch.int64)),
    "numpy word too large": lambda state: changed(state, "numpy", 3, 2**40),
    "numpy beyond its words": lambda state: changed(state, "numpy", -2, 10**6),
    "numpy flag": lambda state: changed(state, "numpy", -1, 7),
    "torch of zeros": lambda state: broken(state, "torch", torch.zeros_like(state["torch"])),
    "torch of another size": lambda state: broken(state, "torch", state["torch"][:16].clone()),
    "torch of floats": lambda state: broken(state, "torch", state["torch"].float()),
    "torch is missing": lambda state: broken(state, "torch", None),
    "gauss is missing": lambda state: broken(state, "numpy_gauss", None),
}


@pytest.mark.parametrize("nonsense", NONSENSE.values(), ids=NONSENSE)
def test_an_rng_state_that_is_none(root, make_state, monkeypatch, nonsense):
    real = rng.capture()
    with monkeypatch.context() as patch:
        patch.setattr(rng, "capture", lambda: nonsense(real))
        path = Checkpointer(root).save(4, make_state(4)).path
    with pytest.raises(DamagedCheckpoint, match=r"global_step_4.*rng\.rank0"):
        Checkpointer(root).load(path, make_state(0))
    after = rng.capture()
    assert all(torch.equal(after[part], real[part]) for part in ("python", "numpy", "torch")), "nothing was restored"


def test_a_rank_without_an_rng_state(save, rewrite_manifest, make_state, root):
    path = save(4)
    rewrite_manifest(path, world_size=2)
    with pytest.raises(DamagedCheckpoint, match=r"rng\.rank1 is missing"):
        Checkpointer(root).load(path, make_state(0))


def test_a_checkpoint_of_no_ranks(save, rewrite_manifest, make_state, root):
    path = save(4)
    rewrite_manifest(path, world_size=0)
    with pytest.raises(DamagedCheckpoint, match="0 where a count of at least 1 was expected"):
        Checkpointer(root).load(path, make_state(0))
    with pytest.raises(NoCheckpoint):
        Checkpointer(root).load(root / "global_step_5", make_state(0))
