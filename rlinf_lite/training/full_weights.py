"""The whole model as one file of a checkpoint, beside the shards: as RLinf's ``save_full_model_weights`` writes it."""

from __future__ import annotations

import torch

from rlinf_lite.training.trainer import Trainer

FULL_WEIGHTS = "model_state_dict/full_weights.pt"
"""Its path in the section."""


def full_weights_file(trainer: Trainer, dtype: torch.dtype, *, keep: bool) -> dict[str, object]:
    """The file's content by its path, for `Checkpointer.save`. Collective.

    Args:
        dtype: of the weights.
        keep: whether this rank writes the file; the others only take part.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, _, tensor in trainer.whole_weights(dtype):
        if keep:
            weights[name] = tensor.detach().to("cpu", copy=True)
    if not keep:
        return {}
    # Tied weights have each of their names, as in the model's state dict, and are stored once.
    return {FULL_WEIGHTS: weights | {alias: weights[name] for alias, name in trainer.names.tied.items()}}
