"""Models whose forward pass ends in numbers per loss token: a policy's log-probs and entropy, a critic's values.

One forward call does it all, because FSDP gathers embeddings, last norm and head when the root's forward is called. So
these wrappers are what FSDP shards as the root. Weights keep the names they have in the wrapped ``model``.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlinf_lite.errors import ConfigError
from rlinf_lite.models.attention import Layout, hidden_states, use
from rlinf_lite.models.head import token_stats
from rlinf_lite.models.logits import logit_transform, output_layer


class ScoredModel(nn.Module):
    """A causal LM that computes log-prob and entropy of loss tokens; its head sees their hidden states only."""

    def __init__(self, model: PreTrainedModel) -> None:
        """
        Args:
            model: a causal LM, not sharded yet; may be on the meta device. From here on its attention is that of
                `models.attention`.

        Raises:
            ConfigError: its logits are not a (scaled or capped) linear function of its last hidden states, or its
                tokens are mixed by more than `models.attention`.
        """
        super().__init__()
        use(model)
        self.model = model
        self.transform = logit_transform(model)

    def forward(
        self,
        ids_N: Tensor,
        positions_N: Tensor,
        layout: Layout,
        source_M: Tensor,
        targets_M: Tensor,
        temperature: float,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute log-prob and entropy of M loss tokens, see `token_stats`.

        Args:
            ids_N, positions_N: int64; N >= MIN_ROWS tokens.
            layout: which of them sees which.
            source_M: index in ``ids_N`` of the token that predicts each loss token. It may occur more than once.
            targets_M: the loss tokens.
        """
        hidden_MD = hidden_states(self.model, ids_N, positions_N, layout)[source_M]
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
        use(model)
        self.model = model
        heads = [child for child in model.children() if isinstance(child, nn.Linear)]
        if [head.out_features for head in heads] != [1]:
            raise ConfigError(
                "a token classifier of this type has no single linear layer after its last hidden state",
                key="model_type",
                value=model.config.model_type,
                remedy="choose another architecture for the critic",
            )

    def forward(self, ids_N: Tensor, positions_N: Tensor, layout: Layout, source_M: Tensor) -> Tensor:
        """Compute the values float32 [M] before M loss tokens; arguments as in `ScoredModel.forward`."""
        hidden_MD = hidden_states(self.model, ids_N, positions_N, layout)[source_M]
        (head,) = (child for child in self.model.children() if isinstance(child, nn.Linear))
        # A matrix product with one column takes kernels in which the number of rows decides how they round.
        values_M = (hidden_MD.float() * head.weight.float()).sum(-1)
        return values_M if head.bias is None else values_M + head.bias.float()
