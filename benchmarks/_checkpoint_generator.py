"""A stand-in for a rollout worker in the checkpoint benchmark: it keeps a core and the memory bus busy."""

from __future__ import annotations

import os
import time

import torch


class Generator:
    """Runs matrix products like those of decoding, in its own process as in a real run.

    Tokens go through the MLP weights of a whole model, so other users of the core and of the memory bus slow it down. A
    rollout is a number of tokens, not of seconds, so that a slowdown can be measured.
    """

    def __init__(self, num_layers: int, hidden_size: int, intermediate_size: int) -> None:
        torch.manual_seed(os.getpid())
        self.weights = torch.randn(num_layers, 2, hidden_size, intermediate_size)

    @torch.no_grad()
    def roll(self, num_tokens: int) -> float:
        """Decode ``num_tokens`` for 8 sequences. Returns the seconds it took."""
        started = time.perf_counter()
        hidden = torch.randn(8, self.weights.shape[2])
        for _ in range(num_tokens):
            for up, down in self.weights:
                hidden = torch.nn.functional.normalize((hidden @ up) @ down.T)
        return time.perf_counter() - started
