"""Products with a wide weight on a CPU: some columns of the result at a time.

A product of few rows and thousands of columns takes up to 1.8 times as long at once: what MKL copies of the weight then
does not fit into the processor's cache. Each element is summed in the same order either way.
"""

from __future__ import annotations

import torch
from torch import Tensor

_AT_A_TIME = 512
"""At least, if there are as many: a product with a few columns would take another kernel, which rounds differently."""


def product(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` [M, N], without gradients."""
    num, last = len(weight_NK), max(0, len(weight_NK) // _AT_A_TIME - 1) * _AT_A_TIME
    found = x_MK.new_empty(len(x_MK), num)
    for first in range(0, last + 1, _AT_A_TIME):
        columns = slice(first, first + _AT_A_TIME if first < last else num)
        if bias_N is None:
            torch.mm(x_MK, weight_NK[columns].t(), out=found[:, columns])
        else:
            torch.addmm(bias_N[columns], x_MK, weight_NK[columns].t(), out=found[:, columns])
    return found
