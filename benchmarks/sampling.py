"""Processor time of sampling one token per row, paired with the product of the output layer in the same process.

``python benchmarks/sampling.py`` takes about half a minute, on one thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from rlinf_lite.counters import counter_hash
from rlinf_lite.models.head import logits_of
from rlinf_lite.rollout.sampling import draw
from rlinf_lite.types import Sampling

HIDDEN = 896
SHAPES = ((16, 151_936), (512, 20))
ROUNDS = 9
SAMPLINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature 0.8": {"temperature": 0.8},
    "top_k 50": {"top_k": 50},
    "top_p 0.95": {"top_p": 0.95},
    "min_p 0.05": {"min_p": 0.05},
    "greedy": {"do_sample": False},
}


def seconds(compute: Callable[[], object]) -> float:
    """Of this process's processor time."""
    began = time.process_time()
    compute()
    return time.process_time() - began


def main() -> None:
    """Print, per shape and kind of sampling, the median milliseconds and the median of the paired ratios."""
    torch.set_num_threads(1)
    plain: dict[str, Any] = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": -1,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
    }
    for num_rows, vocabulary in SHAPES:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(num_rows, HIDDEN, generator=generator)
        head = torch.randn(vocabulary, HIDDEN, generator=generator) * 0.05
        logits = logits_of(hidden, head, None)
        keys = counter_hash("benchmark", np.arange(num_rows))
        for name, changes in SAMPLINGS.items():
            sampling = Sampling(**(plain | changes), max_new_tokens=1)
            draw(logits, sampling, keys, 0)
            pairs = [
                (seconds(partial(draw, logits, sampling, keys, t)), seconds(partial(logits_of, hidden, head, None)))
                for t in range(ROUNDS)
            ]
            ours, product = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
            ratio = statistics.median(drawn / multiplied for drawn, multiplied in pairs)
            print(
                f"{num_rows} x {vocabulary}, {name}: {ours:.2f} ms, output layer {product:.2f} ms, ratio {ratio:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
