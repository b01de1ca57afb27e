"""Decoding on a CPU: wide layers compute some columns at a time, see models/columns.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from rlinf_lite.models.columns import product
from rlinf_lite.models.head import MIN_ROWS

_WIDE = 1024
"""Outputs of a layer for which it is worth the calls."""
_FEW = 256
"""Rows up to which it is faster."""


class WideLayers:
    """Replaces the forward method of a model's wide linear layers, for few rows.

    The trainer computes all columns at once. So layers of a shape are computed by columns only after that was bitwise
    identical for one of them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._layers = [
            module
            for module in model.base_model.modules()
            if type(module) is nn.Linear
            and module.out_features >= _WIDE
            and module.weight.device.type == "cpu"
            and module.weight.dtype == torch.float32
        ]
        self._equal: dict[tuple[torch.Size, bool], bool] = {}
        """By shape, and whether there is a bias."""
        for layer in self._layers:
            layer.forward = self._forward_of(layer)  # type: ignore[method-assign, assignment]

    def _forward_of(self, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if x.requires_grad or x.shape[:-1].numel() > _FEW or not self._equal.get(_kind(layer)):
                return functional.linear(x, layer.weight, layer.bias)
            return product(x.flatten(0, -2), layer.weight, layer.bias).unflatten(0, x.shape[:-1])

        return forward

    def check(self) -> None:
        """Look for which layers the results are bitwise identical, once. The model has its weights."""
        if self._equal:
            return
        for layer in self._layers:
            if (kind := _kind(layer)) not in self._equal:
                weight, bias = layer.weight, layer.bias
                x = torch.randn(_FEW, weight.shape[1], generator=torch.Generator().manual_seed(0))
                self._equal[kind] = all(
                    torch.equal(product(x[:num], weight, bias), functional.linear(x[:num], weight, bias))
                    for num in (MIN_ROWS, 2 * MIN_ROWS, _FEW)
                )


def _kind(layer: nn.Linear) -> tuple[torch.Size, bool]:
    return layer.weight.shape, layer.bias is not None
