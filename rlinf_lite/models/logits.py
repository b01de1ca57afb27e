"""What a causal LM of transformers does between hidden states and logits: found by calling its own forward method."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rlinf_lite.errors import ConfigError
from rlinf_lite.models.head import LogitTransform

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
"""Names in an architecture's config. Some architectures multiply by a scale, some divide."""
OWN_WAY = "computes logits from hidden states in its own way"


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """The layer that makes logits of hidden states; its weight may be tied to the embeddings.

    Raises:
        ConfigError: the model has more than one linear layer after its last hidden state, or none.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not {head, model.base_model} <= set(model.children()):
        raise _unsupported(model, "has no single linear layer after its last hidden state")
    return head


@torch.no_grad()
def logit_transform(model: PreTrainedModel) -> LogitTransform:
    """Find what the model does with the product of hidden states and weight of its `output_layer` to get logits.

    The model's own forward method runs with made-up hidden states and a small output layer instead of its own, so the
    model may be on the meta device; it must not be sharded yet.

    Raises:
        ConfigError: it does something that no `LogitTransform` describes.
    """
    head = output_layer(model)
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 4, head.in_features, generator=random)
    weight = torch.randn(8, head.in_features, generator=random).mul_(10.0 / head.in_features**0.5)
    product = hidden @ weight.t()  # about 10: large enough for a softcap to show
    try:
        own = _own_logits(model, head, hidden, weight)
    except RuntimeError as error:  # shapes that do not fit, or a part of the backbone that was called on its own
        raise _unsupported(model, OWN_WAY) from error
    for transform in _candidates(model.config.get_text_config()):
        if own.shape == product.shape and torch.allclose(own, transform(product), rtol=1e-4, atol=1e-4):
            return transform
    raise _unsupported(model, OWN_WAY)


def _candidates(config: PretrainedConfig) -> Iterator[LogitTransform]:
    yield LogitTransform()
    for name in SOFTCAPS:
        if softcap := getattr(config, name, None):
            yield LogitTransform(softcap=softcap)
    for name in SCALES:
        if scale := getattr(config, name, None):
            yield LogitTransform(scale=scale)
            yield LogitTransform(scale=1.0 / scale)


class _Outputs:
    """What a backbone returns: hidden states, and nothing else, under whatever name."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


def _own_logits(model: PreTrainedModel, head: nn.Linear, hidden: Tensor, weight: Tensor) -> Tensor:
    """The logits that the model's forward method makes of ``hidden`` with ``weight`` in its output layer."""

    def stub(module: nn.Module) -> nn.Module:
        made = copy.copy(module)
        made.forward = lambda *args, **kwargs: _Outputs(hidden)
        made._modules = {name: child and stub(child) for name, child in module._modules.items()}
        return made

    small = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    small.weight.copy_(weight)
    shell = copy.copy(model)
    shell._modules = dict(model._modules)
    for name, child in model.named_children():
        if child in (head, model.base_model):
            shell._modules[name] = small if child is head else stub(child)
    return shell(input_ids=torch.zeros(hidden.shape[:2], dtype=torch.int64), use_cache=False).logits


def _unsupported(model: PreTrainedModel, reason: str) -> ConfigError:
    return ConfigError(
        f"a model of this type {reason}, which rlinf_lite cannot train",
        key="model_type",
        value=model.config.model_type,
        remedy="choose another architecture (Qwen, Llama, Gemma, GPT-2 and most decoder-only ones are supported)",
    )
