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

    Only within it do the layers compute with them: several engines may have the same model. The results are bitwise
    identical to those of `products.product` with the weight itself.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._copies: dict[nn.Linear, Tensor] = {}
        self._is_open, self._num_bytes = False, 0
        self._layers = {
            layer: self._forward_of(layer)
            for layer in model.base_model.modules()
            if type(layer) is nn.Linear and layer.weight.numel() >= _LARGE
        }
        self._before: dict[nn.Linear, Callable[[Tensor], Tensor]] = {}

    def __enter__(self) -> None:
        self._is_open = True
        for layer, forward in self._layers.items():
            self._before[layer] = layer.forward
            layer.forward = forward  # type: ignore[method-assign, assignment]

    def __exit__(self, *_: object) -> None:
        for layer, forward in self._before.items():
            layer.forward = forward  # type: ignore[method-assign, assignment]
        self._before.clear()
        self._copies.clear()
        self._is_open, self._num_bytes = False, 0

    def weight(self, layer: nn.Linear, num_rows: int) -> Tensor:
        """The weight to multiply ``num_rows`` rows with: a copy, or the layer's own."""
        if num_rows > _FEW or not self._is_open:
            return layer.weight
        copy = self._copies.get(layer)
        if copy is None and self._takes(layer.weight):
            copy = self._copies[layer] = products.packed(layer.weight)
            self._num_bytes += layer.weight.nbytes
        return layer.weight if copy is None else copy

    def _takes(self, weight: Tensor) -> bool:
        fits = weight.numel() >= _LARGE and self._num_bytes + weight.nbytes <= MAX_BYTES
        return fits and products.takes(weight, weight)

    def _forward_of(self, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            return products.product(x, self.weight(layer, x.numel() // x.shape[-1]), layer.bias)

        return forward
