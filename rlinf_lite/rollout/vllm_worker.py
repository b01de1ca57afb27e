"""What runs inside vLLM's own worker, one a tensor-parallel rank: new weights into the model that is there."""

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
    """Mixed into vLLM's worker class by its name. A load is ``begin_weights``, ``take_weights`` ..., ``end_weights``.

    vLLM's layerwise reload does the work: a layer is filled when its last weight has come, processed as at start-up
    (on CPUs: packed for the kernels), and copied over the old one, whose memory and CUDA graphs stay.
    """

    vllm_config: Any
    model_runner: Any
    device: torch.device
    _loading = False

    def begin_weights(self) -> None:
        # It reports each layer that gets no weight of its own, such as a tied one, which is seen to below.
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
        if self._loading:
            self.end_weights()  # the last load broke off half-way; what it left is replaced now
        self._loading = True
        model = self.model_runner.get_model()
        self._missing = {name for name, _ in model.named_parameters()}
        with set_current_vllm_config(self.vllm_config), torch.no_grad():
            initialize_layerwise_reload(model)

    def take_weights(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        """Whole tensors under their Hugging Face names; each rank keeps its part."""
        with set_current_vllm_config(self.vllm_config), torch.no_grad(), torch.device(self.device):
            self._missing -= self.model_runner.get_model().load_weights(iter(weights))

    def end_weights(self) -> list[str]:
        """Returns the parameters that got no weight."""
        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config), torch.no_grad(), torch.device(self.device):
            finalize_layerwise_reload(model, self.vllm_config.model_config)
            for layer in _tied_layers(model):
                layer.quant_method.process_weights_after_loading(layer)  # type: ignore[union-attr, operator]
        self._loading = False
        return sorted(self._missing)


def _tied_layers(model: nn.Module) -> list[nn.Module]:
    """The embedding and the output layer that share a parameter: only the first was loaded, and the packed copy that
    the second computes with on a CPU would stay the old one."""
    embeddings = [layer for layer in model.modules() if "weight" in layer._parameters and "quant_method" in vars(layer)]
    sharers = Counter(id(layer.weight) for layer in embeddings)
    return [layer for layer in embeddings if sharers[id(layer.weight)] > 1]
