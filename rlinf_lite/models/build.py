"""Build a causal LM without its weights: parameters on the meta device, buffers allocated."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from rlinf_lite.config.fields import TYPE_NAMES
from rlinf_lite.errors import ConfigError
from rlinf_lite.ties import tied_names

DTYPES: dict[str, torch.dtype] = {precision: getattr(torch, name) for precision, name in TYPE_NAMES.items()}


def build_on_meta(config: PretrainedConfig, precision: str) -> PreTrainedModel:
    """Build the architecture of ``config`` with parameters of type ``precision`` that occupy no memory.

    Buffers are allocated, because no file holds the computed ones (rotary frequencies).

    Raises:
        ConfigError: transformers has no causal LM of this type.
    """
    try:
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[precision])
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"actor.model.model_path: transformers has no causal LM for the model type {config.model_type}: {reason}"
        ) from error
    model.tie_weights()
    return model


def build_value_model_on_meta(config: PretrainedConfig, precision: str) -> PreTrainedModel:
    """Build a token classifier with one label on the architecture of ``config``, as `build_on_meta` builds a causal LM.

    Raises:
        ConfigError: transformers has no token classifier of this type.
    """
    config = copy.deepcopy(config)
    config.num_labels = 1
    try:
        with _parameters_on_meta():
            return AutoModelForTokenClassification.from_config(config, dtype=DTYPES[precision])
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"critic.model.model_path: transformers has no token classifier for the model type {config.model_type}, "
            f"which the critic's values need: {reason}"
        ) from error


def disable_dropout(config: PretrainedConfig) -> None:
    """Set every dropout probability of an architecture to 0: ``resid_pdrop``, ``hidden_dropout_prob`` ..."""
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            disable_dropout(value)
        elif ("dropout" in name or name.endswith(("pdrop", "layerdrop"))) and isinstance(value, float):
            setattr(config, name, 0.0)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters are not initialized either: on meta that changes nothing, and takes most of the time of building."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        with no_init_weights():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def materialize(model: PreTrainedModel, device: torch.device) -> None:
    """Allocate meta parameters (uninitialized) on ``device`` and move buffers there. Tied parameters stay tied."""
    tied = tied_names(model)
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    if tied_names(model) != tied:
        model.tie_weights()
    assert tied_names(model) == tied
