"""Tied parameters: names of a module that stand for one tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def tied_names(model: nn.Module) -> dict[str, str]:
    """``{"lm_head.weight": "model.embed_tokens.weight"}``: parameters that are the same tensor as an earlier one."""
    first: dict[nn.Parameter, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first[param] for name, param in named if first.setdefault(param, name) != name}
