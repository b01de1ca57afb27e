"""On one GPU, a run that is killed and resumed ends bitwise identical to one that is not; also with Megatron-core."""

from __future__ import annotations

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

ON_GPU = {
    "cluster.device": "cuda",
    "cluster.component_placement.actor": "0",
    "cluster.component_placement.rollout": "0",
}


def test_a_killed_run_ends_bitwise_identical(new_run, same_run):
    straight, killed = new_run(ON_GPU), new_run(ON_GPU)
    straight.finish()
    killed.kill_when("global_step_3 (")
    killed.finish("runner.resume_dir=auto")
    same_run(straight, killed, 8)


@pytest.mark.parametrize("layers", ["local", "transformer_engine"])
def test_with_megatron(new_run, same_run, layers):
    pytest.importorskip("megatron.core")
    if layers == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch")
    given = {**ON_GPU, "actor.training_backend": "megatron", "actor.megatron.transformer_impl": layers}
    straight, killed = new_run(given), new_run(given)
    straight.finish()
    killed.kill_when("global_step_3 (")
    killed.finish("runner.resume_dir=auto")
    same_run(straight, killed, 8)
