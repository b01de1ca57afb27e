"""Matrix products of linear layers in fp32: oneDNN, as `models/products.py` has it, beside torch's own (MKL).

    python benchmarks/products.py [--threads 1] [--rounds 7]

Takes a quarter of a minute. Microseconds of processor time, medians of rounds in turns; each round goes through the
weights of 12 layers. `packed` is the engine's copy of the weights. Where the processor has AVX-512,
`ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2` before the command shows an older one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from rlinf_lite import numerics
from rlinf_lite.models import products

SHAPES = ((576, 576), (1536, 576), (576, 1536))
"""Outputs and inputs of SmolLM2-135M's layers."""
ROWS = (4, 8, 32, 256, 1024)
LAYERS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    options = parser.parse_args()
    numerics.fix("cpu", threads=options.threads)
    print("outputs  inputs  rows | forward: MKL  oneDNN  packed | gradients: MKL  oneDNN")
    for outputs, inputs in SHAPES:
        weights = [torch.randn(outputs, inputs) for _ in range(LAYERS)]
        copies = [products.packed(weight) for weight in weights]
        for rows in ROWS:
            x, grad = torch.randn(rows, inputs), torch.randn(rows, outputs)
            forward, backward = of_forward(x, weights, copies), of_gradients(x, grad, weights)
            one, two, three = in_turns(forward, options.rounds)
            four, five = in_turns(backward, options.rounds)
            shape = f"{outputs:7}{inputs:8}{rows:6}"
            print(f"{shape} | {one:12.0f}{two:8.0f}{three:8.0f} | {four:14.0f}{five:8.0f}", flush=True)


def of_forward(x: Tensor, weights: list[Tensor], copies: list[Tensor]) -> list[Callable[[int], object]]:
    return [
        lambda layer: functional.linear(x, weights[layer]),
        lambda layer: products.product(x, weights[layer], None),
        lambda layer: products.product(x, copies[layer], None),
    ]


def of_gradients(x: Tensor, grad: Tensor, weights: list[Tensor]) -> list[Callable[[int], object]]:
    """Of the inputs and of the weight."""
    return [
        lambda layer: (grad @ weights[layer], grad.t() @ x),
        lambda layer: (products.product(grad, weights[layer].t(), None), products.weight_gradient(grad, x)),
    ]


def in_turns(calls: list[Callable[[int], object]], rounds: int) -> list[float]:
    """Microseconds of each."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 1):
        for seconds, call in zip(found, calls, strict=True):
            began = time.process_time()
            for layer in range(LAYERS):
                call(layer)
            seconds.append((time.process_time() - began) / LAYERS * 1e6)
    return [median(seconds[1:]) for seconds in found]  # the first round compiles kernels


if __name__ == "__main__":
    main()
