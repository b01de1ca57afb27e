"""What stands for a rollout worker in the checkpoint benchmark."""

from __future__ import annotations

import os
import time

import torch


class Generator:
    """A process of its own, as in a real run, that multiplies like decoding does.

    Tokens go through the MLP weights of a whole model, so that it needs a core and the memory bus, and is slowed by
    what else uses them. A rollout is a number of tokens, not of seconds: otherwise nothing could slow it.
    """

    def __init__(self, num_layers: int, hidden_size: int, intermediate_size: int) -> None:
        torch.manual_seed(os.getpid())
        self.weights = torch.randn(num_layers, 2, hidden_size, intermediate_size)

    @torch.no_grad()
    def roll(self, num_tokens: int) -> float:
        """Decode ``num_tokens`` for 8 sequences; the seconds that took."""
        started = time.perf_counter()
        hidden = torch.randn(8, self.weights.shape[2])
        for _ in range(num_tokens):
            for up, down in self.weights:
                hidden = torch.nn.functional.normalize((hidden @ up) @ down.T)
        return time.perf_counter() - started
