"""Decoding on a CPU: the weights of large layers, copied into the layout in which oneDNN reads them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlinf_lite.models import products

_LARGE = 1 << 16
"""Elements of a weight for which a copy is worth it."""
_FEW = 128
"""Rows up to which it is."""
MAX_BYTES = 1 << 31
"""Of all copies."""


class PackedLayers:
    """Copies of a model's large weights, made when they are first needed and dropped at the end of a ``with`` block.

    The results are bitwise identical to those of `products.product` with the weight itself.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._copies: dict[nn.Linear, Tensor] = {}
        self._is_open, self._num_bytes = False, 0
        for layer in model.base_model.modules():
            if type(layer) is nn.Linear and layer.weight.numel() >= _LARGE:
                layer.forward = self._forward_of(layer)  # type: ignore[method-assign, assignment]

    def __enter__(self) -> None:
        self._is_open = True

    def __exit__(self, *_: object) -> None:
        self._copies.clear()
        self._is_open, self._num_bytes = False, 0

    def weight(self, layer: nn.Linear, num_rows: int) -> Tensor:
        """The weight to multiply ``num_rows`` rows with: a copy, or the layer's own."""
        copy, weight = self._copies.get(layer), layer.weight
        if num_rows > _FEW or not self._is_open:
            return weight
        if copy is None and self._takes(weight):
            copy = self._copies[layer] = products.packed(weight)
            self._num_bytes += weight.nbytes
        return weight if copy is None else copy

    def _takes(self, weight: Tensor) -> bool:
        fits = weight.numel() >= _LARGE and self._num_bytes + weight.nbytes <= MAX_BYTES
        return fits and products.takes(weight, weight)

    def _forward_of(self, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            return products.linear(x, self.weight(layer, x.shape[:-1].numel()), layer.bias)

        return forward
