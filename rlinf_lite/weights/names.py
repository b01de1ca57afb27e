"""Which weights a model has: their names, order and shapes, and the other names of tied ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from rlinf_lite.ties import tied_names


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters (tied ones once, under their first name), then persistent buffers: what a checkpoint must hold."""
    yield from model.named_parameters()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rsplit(".", 1)[-1] not in module._non_persistent_buffers_set:
                yield name, buffer


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and global shape of each of the `named_weights`, in their order."""
    return {name: tuple(tensor.shape) for name, tensor in named_weights(model)}


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightNames:
    """The weights of one architecture, without their values."""

    shapes: dict[str, tuple[int, ...]]
    """By name, in the model's order."""
    tied: dict[str, str]
    """Further names of some of them: ``{"lm_head.weight": "model.embed_tokens.weight"}``."""
    base_prefix: str
    """What a file saved from the bare base model leaves out of the names: ``"transformer."`` for GPT-2."""

    @classmethod
    def of(cls, model: nn.Module) -> WeightNames:
        """
        Args:
            model: a `PreTrainedModel`, or another module with a ``base_model_prefix``; may be on the meta device.
        """
        return cls(shapes=weight_shapes(model), tied=tied_names(model), base_prefix=f"{model.base_model_prefix}.")

    def stored_names(self, name: str) -> list[str]:
        """All names under which a Hugging Face directory may hold this weight, the most likely first."""
        own = [name, *(alias for alias, first in self.tied.items() if first == name)]
        return list(dict.fromkeys([*own, *(one.removeprefix(self.base_prefix) for one in own)]))


def listed(names: list[str], limit: int = 10) -> str:
    """The first ``limit`` names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
