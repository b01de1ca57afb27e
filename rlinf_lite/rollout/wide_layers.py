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
        self._equal: dict[torch.Size, bool] = {}
        for layer in self._layers:
            layer.forward = self._forward_of(layer)  # type: ignore[method-assign, assignment]

    def _forward_of(self, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if x.requires_grad or x.shape[:-1].numel() > _FEW or not self._equal.get(layer.weight.shape):
                return functional.linear(x, layer.weight, layer.bias)
            return product(x.flatten(0, -2), layer.weight, layer.bias).unflatten(0, x.shape[:-1])

        return forward

    def check(self) -> None:
        """Look for which shapes the results are bitwise identical, once. The model has its weights."""
        if self._equal:
            return
        for layer in self._layers:
            weight, bias = layer.weight, layer.bias
            if weight.shape not in self._equal:
                x = torch.randn(2 * MIN_ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0))
                self._equal[weight.shape] = all(
                    torch.equal(product(rows, weight, bias), functional.linear(rows, weight, bias))
                    for rows in (x, x[:MIN_ROWS])
                )
