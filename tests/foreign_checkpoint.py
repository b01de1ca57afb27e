"""Training states of other programs: a model after some steps of Adam, saved as RLinf does with FSDP and Megatron."""

import random
import runpy
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.checkpoint.stateful import Stateful

LAYOUT = runpy.run_path(str(Path(__file__).parent / "unit" / "export" / "megatron_layout.py"))
NUM_STEPS = 3


class TrainingState(Stateful):
    """What RLinf gives to ``dcp.save`` under the key ``fsdp_checkpoint``."""

    def __init__(self, model, optimizer, scheduler):
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler

    def state_dict(self):
        options = StateDictOptions(full_state_dict=False, cpu_offload=True)
        model, optimizer = get_state_dict(model=self.model, optimizers=self.optimizer, options=options)
        rng = {"cpu": torch.get_rng_state(), "numpy": np.random.get_state(), "random": random.getstate()}
        return {
            "model": model,
            "optimizers": optimizer,
            "lr_schedulers": [self.scheduler.state_dict()],
            "fsdp_version": "fsdp2",
            "rng": rng,
        }

    def load_state_dict(self, state):
        raise AssertionError("is only saved")


def train(model):
    """Take `NUM_STEPS` steps. Returns optimizer and scheduler."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for step in range(NUM_STEPS):
        model(torch.tensor([[1, 5, 3, step]])).logits.square().sum().backward()
        optimizer.step(), scheduler.step(), optimizer.zero_grad()
    return optimizer, scheduler


def write_fsdp(checkpoint, model, optimizer, scheduler):
    """RLinf's ``global_step_N`` of a model that FSDP trained."""
    state = {"fsdp_checkpoint": TrainingState(model, optimizer, scheduler)}
    dcp.save(state, checkpoint_id=checkpoint / "actor" / "dcp_checkpoint")


def write_megatron(checkpoint, model, optimizer, *, size, step, dtype=torch.float32):
    """RLinf's ``global_step_N`` of a model that Megatron trained on ``size`` tensor-parallel ranks."""
    params = dict(model.named_parameters())
    moments = [
        {name: optimizer.state[param][part] for name, param in params.items()} for part in ("exp_avg", "exp_avg_sq")
    ]
    LAYOUT["write"](checkpoint / "actor", model.config, params, moments, size=size, step=step, dtype=dtype)
