"""Models whose forward pass ends in numbers per loss token: a policy's log-probs and entropy, a critic's values.

One forward call does it all, because FSDP gathers embeddings, last norm and head when the root's forward is called. So
these wrappers are what FSDP shards as the root. Weights keep the names they have in the wrapped ``model``.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from rlinf_lite.errors import ConfigError
from rlinf_lite.models.head import token_stats
from rlinf_lite.models.logits import logit_transform, output_layer


class ScoredModel(nn.Module):
    """A causal LM that computes log-prob and entropy of loss tokens; its head sees their hidden states only."""

    def __init__(self, model: PreTrainedModel) -> None:
        """
        Args:
            model: a causal LM, not sharded yet; may be on the meta device.

        Raises:
            ConfigError: its logits are not a (scaled or capped) linear function of its last hidden states.
        """
        super().__init__()
        self.model = model
        self.transform = logit_transform(model)

    def forward(
        self,
        ids_BT: Tensor,
        rows_M: Tensor,
        columns_M: Tensor,
        targets_M: Tensor,
        temperature: float,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute log-prob and entropy of M loss tokens, see `token_stats`.

        Args:
            ids_BT: int64, padded on the right: under a causal mask no token attends to the padding.
            rows_M, columns_M: where a loss token is predicted: by what stands at ``ids_BT[row, column]``, for the
                token after it. A place may occur more than once.
            targets_M: the loss tokens.
        """
        hidden_MD = _hidden(self.model, ids_BT, rows_M, columns_M)
        head = output_layer(self.model)
        return token_stats(
            hidden_MD,
            head.weight,
            head.bias,
            targets_M,
            temperature,
            with_entropy=with_entropy,
            transform=self.transform,
        )


class ValueModel(nn.Module):
    """A token classifier with one label that computes a value per loss token; its dropout is never applied."""

    def __init__(self, model: PreTrainedModel) -> None:
        """
        Args:
            model: from `build_value_model_on_meta`.

        Raises:
            ConfigError: it has no single linear layer of one output after its last hidden states.
        """
        super().__init__()
        self.model = model
        heads = [child for child in model.children() if isinstance(child, nn.Linear)]
        if [head.out_features for head in heads] != [1]:
            raise ConfigError(
                "a token classifier of this type has no single linear layer after its last hidden state",
                key="model_type",
                value=model.config.model_type,
                remedy="choose another architecture for the critic",
            )

    def forward(self, ids_BT: Tensor, rows_M: Tensor, columns_M: Tensor) -> Tensor:
        """Compute the values float32 [M] before M loss tokens; arguments as in `ScoredModel.forward`."""
        hidden_MD = _hidden(self.model, ids_BT, rows_M, columns_M)
        (head,) = (child for child in self.model.children() if isinstance(child, nn.Linear))
        value_M = functional.linear(hidden_MD, head.weight, head.bias).squeeze(1).float()
        return value_M.clone()  # FSDP warns about a view


def _hidden(model: PreTrainedModel, ids_BT: Tensor, rows_M: Tensor, columns_M: Tensor) -> Tensor:
    """Hidden states [M, D] after the last norm."""
    hidden_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    # Autograd adds up the gradients of a place that occurs more than once, in a fixed order on a GPU too: its kernel
    # sorts the places and uses no atomic additions.
    return hidden_BTD[rows_M, columns_M]
