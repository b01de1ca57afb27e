"""Runs inside vLLM's own worker, once per tensor-parallel rank: loads new weights into the existing model."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


class WeightReceiver:
    """An extension of vLLM's worker class. A load is ``begin_weights``, ``take_weights`` ..., ``end_weights``.

    It uses vLLM's layerwise reload: a layer is filled when its last weight has arrived, processed as at start-up (on
    CPUs: packed for the kernels), and copied over the old one, whose memory and CUDA graphs stay.
    """

    vllm_config: Any
    model_runner: Any
    device: torch.device
    _loading = False

    def begin_weights(self) -> None:
        # It warns about each layer without weights of its own, such as a tied one, which `end_weights` handles.
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
        if self._loading:
            self.end_weights()  # the last load was interrupted; this one replaces what it loaded
        self._loading = True
        model = self.model_runner.get_model()
        self._missing = {name for name, _ in model.named_parameters()}
        with set_current_vllm_config(self.vllm_config), torch.no_grad():
            initialize_layerwise_reload(model)

    def take_weights(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        """Load whole tensors, by their Hugging Face names; each rank keeps its shard."""
        with set_current_vllm_config(self.vllm_config), torch.no_grad(), torch.device(self.device):
            self._missing -= self.model_runner.get_model().load_weights(iter(weights))

    def end_weights(self) -> list[str]:
        """Finish the load; returns the parameters that got no weight."""
        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config), torch.no_grad(), torch.device(self.device):
            finalize_layerwise_reload(model, self.vllm_config.model_config)
            for layer in _tied_layers(model):
                layer.quant_method.process_weights_after_loading(layer)  # type: ignore[union-attr, operator]
        self._loading = False
        return sorted(self._missing)


def _tied_layers(model: nn.Module) -> list[nn.Module]:
    """Embedding and output layer that share a parameter. Only the first was loaded: on a CPU the second computes with a
    packed copy of its own, which would keep the old weights."""
    embeddings = [layer for layer in model.modules() if "weight" in layer._parameters and "quant_method" in vars(layer)]
    sharers = Counter(id(layer.weight) for layer in embeddings)
    return [layer for layer in embeddings if sharers[id(layer.weight)] > 1]
