"""The layers of Llama, Mistral, Qwen2 and Qwen3 in fewer calls: the engine's forward pass on a CPU.

With few tokens a good part of a forward pass is spent not in operations, but between and on the way to them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from rlinf_lite.models import attention, products
from rlinf_lite.models.attention import Layout, Rule
from rlinf_lite.models.forest import Forest
from rlinf_lite.rollout.packed_layers import PackedLayers
from rlinf_lite.types import Segments

_TYPES = {"llama", "mistral", "qwen2", "qwen3"}
"""Others may look like these with some weights, positions or settings only, so that a trial shows no difference."""
_TRIED = 4
"""The first and as many of the last positions are tried."""


class LlamaLayers:
    """The forward pass of one unsharded model in float32, with results that are bitwise identical to its own."""

    @classmethod
    def of(cls, model: PreTrainedModel, packed: PackedLayers) -> LlamaLayers | None:
        """Those of ``model``, which was prepared by `attention.use` and has its weights.

        None: this is not one of those types, as transformers has them, in float32. Or a trial did not give the results
        of the model's own forward pass bit for bit: another version of transformers may have changed it.
        """
        weight, config = next(model.parameters()), model.config.get_text_config()
        if config.model_type not in _TYPES or not type(model).__module__.startswith("transformers."):
            return None
        if config.hidden_act != "silu":
            return None
        last = (attention.longest_sequence(config) or 0) - 1
        if last < 2 * _TRIED or not products.takes(weight, weight):
            return None
        positions_N = torch.cat([torch.arange(_TRIED), last - torch.arange(_TRIED)])
        ids_N = torch.arange(len(positions_N)) * 7 % config.vocab_size
        one = Segments(start_S=torch.tensor([0]), stop_S=torch.tensor([len(ids_N)]), parent_S=torch.tensor([-1]))
        layout = Forest(one)
        seen = _SeenRules(layout)
        wanted_ND = attention.hidden_states(model, ids_N, positions_N, seen)
        found = cls(model, packed, seen.rules)
        try:
            equal = torch.equal(found.hidden(ids_N, positions_N, layout), wanted_ND)
        except (AttributeError, LookupError, TypeError, RuntimeError, ValueError):  # layers of another form
            return None
        return found if equal else None

    def __init__(self, model: PreTrainedModel, packed: PackedLayers, rules: list[Rule]) -> None:
        """
        Args:
            rules: of each layer's attention.
        """
        self._model, self._base, self._packed, self._rules = model, model.base_model, packed, rules

    def hidden(self, ids_N: Tensor, positions_N: Tensor, layout: Layout) -> Tensor:
        """As `attention.hidden_states`, without gradients."""
        num, base = len(ids_N), self._base
        attention.check_length(self._model.config.get_text_config(), layout.longest)
        if missing := attention.num_missing(self._model, num):
            ids_N, positions_N = (functional.pad(x, (0, missing)) for x in (ids_N, positions_N))
        x_ND = base.embed_tokens(ids_N)
        cos, sin = (each[0, :, None] for each in base.rotary_emb(x_ND[None], positions_N[None]))
        half = sin.shape[-1] // 2
        turn = cos, torch.cat((-sin[..., :half], sin[..., half:]), -1)
        for index, (layer, rule) in enumerate(zip(base.layers, self._rules, strict=True)):
            normal = _normalized(x_ND, layer.input_layernorm)
            q_HND, k_KND, v_KNE = (
                each[:num].transpose(0, 1) for each in self._queries_keys_values(layer.self_attn, normal, turn)
            )
            mixed_ND = layout.attend(index, q_HND, k_KND, v_KNE, rule).flatten(1)
            if missing:
                mixed_ND = functional.pad(mixed_ND, (0, 0, 0, missing))
            x_ND = layer.self_attn.o_proj.forward(mixed_ND).add_(x_ND)
            x_ND = self._gated(layer.mlp, _normalized(x_ND, layer.post_attention_layernorm)).add_(x_ND)
        return _normalized(x_ND, base.norm)[:num]

    def _queries_keys_values(
        self, attn: Any, x_ND: Tensor, turn: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[N, H, D], [N, K, D] and [N, K, E], the first two with rotary embeddings."""
        projections, dim = (attn.q_proj, attn.k_proj, attn.v_proj), attn.head_dim
        sizes = [each.out_features // dim for each in projections]
        if (joint := self._packed.joint(projections, len(x_ND))) is not None:
            together = products.product(x_ND, *joint).unflatten(1, (-1, dim))
            q, k, v = together.split(sizes, 1)
            turned = together[:, : -sizes[2]]
        else:
            q, k, v = (each.forward(x_ND).unflatten(1, (-1, dim)) for each in projections)
            turned = None
        if (of_queries := getattr(attn, "q_norm", None)) is not None:
            q, k, turned = _normalized(q, of_queries), _normalized(k, attn.k_norm), None
        if turned is None:
            turned = torch.cat((q, k), 1)
        cos, signed_sin = turn
        crossed = turned.roll(dim // 2, -1).mul_(signed_sin)
        turned.mul_(cos).add_(crossed)
        return turned[:, : sizes[0]], turned[:, sizes[0] :], v

    def _gated(self, mlp: Any, x_ND: Tensor) -> Tensor:
        width = mlp.gate_proj.out_features
        joint = None if width % attention.VECTORS else self._packed.joint((mlp.gate_proj, mlp.up_proj), len(x_ND))
        if joint is None:
            gate, up = mlp.gate_proj.forward(x_ND), mlp.up_proj.forward(x_ND)
        else:
            gate, up = products.product(x_ND, *joint).split(width, 1)
        found: Tensor = mlp.down_proj.forward(functional.silu(gate, inplace=True) * up)
        return found


class _SeenRules:
    """A `Layout` that notes what the layers ask of another one."""

    def __init__(self, layout: Layout) -> None:
        self._layout, self.calls, self.longest = layout, 0, layout.longest
        self.rules: list[Rule] = []

    def attend(self, layer: int, q_HND: Tensor, k_KND: Tensor, v_KNE: Tensor, rule: Rule) -> Tensor:
        self.rules.append(rule)
        return self._layout.attend(layer, q_HND, k_KND, v_KNE, rule)


def _normalized(x: Tensor, norm: Any) -> Tensor:
    scale = x.square().mean(-1, keepdim=True).add_(norm.variance_epsilon).rsqrt_()
    return (x * scale).mul_(norm.weight)
