"""Products of few rows on a GPU with a kernel of our own, in Triton, in the layers where it is faster.

cuBLASLt may not split the summed dimension (see `numerics`), so a layer with many inputs and few outputs keeps few
multiprocessors busy. The kernel sums in the same order: it is used for a layer only after it gave the very bits of
cuBLASLt with the layer's own weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional

_Tiles = tuple[int, int, int]
_TILES: tuple[_Tiles, ...] = ((16, 32, 128), (16, 64, 128), (32, 64, 64), (64, 64, 64))
"""Rows, outputs and inputs of a tile."""
_CALLS = 10
"""Calls that are timed together."""
_OF_MODELS: weakref.WeakKeyDictionary[nn.Module, FewRows] = weakref.WeakKeyDictionary()


class FewRows:
    """Replaces the forward method of some linear layers of a model, for numbers of rows that `prepare` was given."""

    @classmethod
    def of(cls, model: nn.Module) -> FewRows:
        """The one of ``model``: several engines may have the same model."""
        found = _OF_MODELS.get(model)
        if found is None:
            found = _OF_MODELS[model] = cls(model)
        return found

    def __init__(self, model: nn.Module) -> None:
        self._layers = [
            module
            for module in model.modules()
            if type(module) is nn.Linear
            and module.weight.dtype in (torch.bfloat16, torch.float16)
            and module.in_features >= 2 * module.out_features
        ]
        self._tiles: dict[tuple[torch.Size, int], _Tiles] = {}
        self._prepared: set[int] = set()
        for layer in self._layers:
            layer.forward = self._forward_of(layer)  # type: ignore[method-assign, assignment]

    def _forward_of(self, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            tiles = self._tiles.get((layer.weight.shape, x.shape[-2]))
            if tiles is None:
                return functional.linear(x, layer.weight, layer.bias)
            return product(x.flatten(0, -2), layer.weight, layer.bias, tiles).view(*x.shape[:-1], -1)

        return forward

    def prepare(self, num_rows: int) -> None:
        """Choose kernels for this many rows. The model has its weights."""
        if num_rows in self._prepared:
            return
        self._prepared.add(num_rows)
        for shape in {layer.weight.shape for layer in self._layers}:
            layers = [layer for layer in self._layers if layer.weight.shape == shape]
            first = layers[0].weight
            generator = torch.Generator(first.device).manual_seed(0)
            x = torch.randn(num_rows, shape[1], device=first.device, generator=generator).to(first.dtype)
            best = _time(lambda x=x, layer=layers[0]: functional.linear(x, layer.weight, layer.bias))  # type: ignore[misc]
            for tiles in _TILES:
                if all(
                    torch.equal(product(x, y.weight, y.bias, tiles), functional.linear(x, y.weight, y.bias))
                    for y in layers
                ):
                    time = _time(lambda x=x, y=layers[0], tiles=tiles: product(x, y.weight, y.bias, tiles))  # type: ignore[misc]
                    if time < best:
                        best, self._tiles[shape, num_rows] = time, tiles


def product(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, tiles: _Tiles) -> Tensor:
    """``x @ weight.T + bias`` [M, N], summed in float32 over K in its order."""
    (num, inputs), outputs, (rows, columns, depth) = x_MK.shape, len(weight_NK), tiles
    out = x_MK.new_empty(num, outputs)
    _product[(triton.cdiv(num, rows), triton.cdiv(outputs, columns))](
        *(x_MK, weight_NK, x_MK if bias_N is None else bias_N, out, num, outputs),
        *(x_MK.stride(0), weight_NK.stride(0)),
        **{"INPUTS": inputs, "ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "BIAS": bias_N is not None},
        num_warps=4,
        num_stages=4,
    )
    return out


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    out,
    num,
    outputs,
    x_stride,
    weight_stride,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BIAS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    x += (row % num)[:, None].to(tl.int64) * x_stride + k[None, :]  # rows and columns behind the last are not stored
    weight += (column % outputs)[None, :].to(tl.int64) * weight_stride + k[:, None]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, INPUTS, DEPTH):
        left = INPUTS - first
        a = tl.load(x, mask=k[None, :] < left, other=0.0)
        b = tl.load(weight, mask=k[:, None] < left, other=0.0)
        total = tl.dot(a, b, total)
        x += DEPTH
        weight += DEPTH
    if BIAS:
        total += tl.load(bias + column % outputs)[None, :].to(tl.float32)
    place = row[:, None].to(tl.int64) * outputs + column[None, :]
    inside = (row[:, None] < num) & (column[None, :] < outputs)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


def _time(call: Callable[[], Any]) -> float:
    """Milliseconds of a call, without what the host needs to start it."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(_CALLS):
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / _CALLS
