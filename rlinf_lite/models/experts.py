"""Mixtures of experts whose tokens' bits do not depend on each other: every expert gets MIN_ROWS tokens at least."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

from rlinf_lite.models.head import MIN_ROWS
from rlinf_lite.models.hf_directory import has_experts

NAME = "rlinf_lite"
"""As transformers knows it."""


def use(model: PreTrainedModel) -> bool:
    """Let the experts of ``model``, if any, compute in this module's way; False if they have another interface."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation(NAME)
        return True
    return not has_experts(model.config)


def _experts(module: Any, hidden_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
    """The outputs [N, D]: each token's experts, weighted, and zeros appended that are routed to all experts."""
    (num, per_token), experts = expert_NK.shape, torch.arange(module.num_experts, device=expert_NK.device)
    added = experts.repeat(MIN_ROWS)
    added = functional.pad(added, (0, -len(added) % per_token)).view(-1, per_token)
    found: Tensor = grouped_mm_experts_forward(
        module,
        functional.pad(hidden_ND, (0, 0, 0, len(added))),
        torch.cat([expert_NK, added.to(expert_NK.dtype)]),
        functional.pad(weight_NK, (0, 0, 0, len(added))),
    )
    return found[:num]


ExpertsInterface.register(NAME, _experts)
