"""Decoding on a CPU: the weights of large layers, copied into the layout in which oneDNN reads them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlinf_lite.models import products

_LARGE = 1 << 16
"""Elements of a weight for which a copy is worth it."""
_FEW = 128
"""Rows up to which it is."""
MAX_BYTES = 1 << 31
"""Of all copies."""
_TRIED_ROWS = (4, 8, 32, 128)
"""Numbers of rows with which a joint product is compared with those that it stands for."""
Joint = tuple[Tensor, Tensor | None]
"""Weight and bias of layers with the same input, as if they were one: their outputs lie side by side."""


class PackedLayers:
    """Copies of a model's large weights, made when they are first needed and dropped at the end of a ``with`` block.

    Only within it do the layers compute with them: several engines may have the same model. The results are bitwise
    identical to those of `products.product` with the weight itself.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._copies: dict[nn.Linear, Tensor] = {}
        self._joint: dict[nn.Linear, Joint] = {}
        """By the first of the layers."""
        self._may_join: dict[tuple[tuple[torch.Size, bool], ...], bool] = {}
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
        self._joint.clear()
        self._is_open, self._num_bytes = False, 0

    def weight(self, layer: nn.Linear, num_rows: int) -> Tensor:
        """The weight to multiply ``num_rows`` rows with: a copy, or the layer's own."""
        if num_rows > _FEW or not self._is_open:
            return layer.weight
        copy = self._copies.get(layer)
        if copy is None and self._take(layer.weight):
            copy = self._copies[layer] = products.packed(layer.weight)
        return layer.weight if copy is None else copy

    def joint(self, layers: tuple[nn.Linear, ...], num_rows: int) -> Joint | None:
        """To multiply ``num_rows`` rows with several layers at once; None: with each of them."""
        if num_rows > _FEW or not self._is_open or not self._layers:
            return None
        found = self._joint.get(layers[0])
        if found is None and self._may_be_joined(layers) and self._take(*(layer.weight for layer in layers)):
            weight, bias = _joined(layers)
            found = self._joint[layers[0]] = products.packed(weight), bias
        return found

    def _may_be_joined(self, layers: tuple[nn.Linear, ...]) -> bool:
        """Whether a joint product of such layers has the very bits of theirs: tried with the first ones."""
        if not all(type(layer) is nn.Linear for layer in layers):
            return False
        kind = tuple((layer.weight.shape, layer.bias is None) for layer in layers)
        may = self._may_join.get(kind)
        if may is None:
            alike = len({without_bias for _, without_bias in kind}) == 1
            may = self._may_join[kind] = alike and all(_is_joint_equal(layers, num) for num in _TRIED_ROWS)
        return may

    def _take(self, *weights: Tensor) -> bool:
        """Whether to copy them; if so, they count."""
        size, num_bytes = sum(weight.numel() for weight in weights), sum(weight.nbytes for weight in weights)
        if size < _LARGE or self._num_bytes + num_bytes > MAX_BYTES or not products.takes(weights[0], weights[0]):
            return False
        self._num_bytes += num_bytes
        return True

    def _forward_of(self, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            return products.product(x, self.weight(layer, x.numel() // x.shape[-1]), layer.bias)

        return forward


def _is_joint_equal(layers: tuple[nn.Linear, ...], num_rows: int) -> bool:
    x = torch.randn(num_rows, layers[0].in_features, generator=torch.Generator().manual_seed(0))
    weight, bias = _joined(layers)
    return products.takes(x, weight) and torch.equal(
        products.product(x, products.packed(weight), bias),
        torch.cat([products.product(x, layer.weight, layer.bias) for layer in layers], -1),
    )


def _joined(layers: tuple[nn.Linear, ...]) -> Joint:
    biases = tuple(layer.bias for layer in layers if layer.bias is not None)
    return torch.cat(tuple(layer.weight for layer in layers)), torch.cat(biases) if biases else None
