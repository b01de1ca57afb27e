"""The attention of trainer, reference model and builtin engine: one function, registered with transformers as ``NAME``.

A model computes flat tokens [1, N]. Which of them sees which is not a mask but a `Layout`, an argument of the model's
forward method (``layout=``): `Forest` (models/forest.py) for training and prompts, `Slots` (rollout/slots.py) for
decoding.

A token's bits depend on its own sequence alone: keys are summed in blocks of ``BLOCK``, counted from position 0, each
matrix product has ``MIN_ROWS`` rows at least, and everything inside is float32. So what is computed together, and how
it is padded, changes nothing (on a CPU with one thread per process).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from rlinf_lite.errors import ConfigError
from rlinf_lite.models import experts, products
from rlinf_lite.models.head import MIN_ROWS

NAME = "rlinf_lite"
"""As transformers knows it. It has no function that makes masks, so transformers makes none."""
BLOCK = 32
"""Keys whose products are summed at once. Another value is another rounding."""
PAD = 16
"""Keys are padded to a multiple of it: zeros at the end of a block change no sum. With 8, MKL takes other kernels."""
_LOWEST = -80.0
"""Probabilities below exp(-80) are computed as that: where the result is denormal, MKL's exp is 60 times slower."""
VECTORS = 32
"""Elements that torch's functions take at once on a CPU with AVX-512; with AVX2 16. What is left at the end of a tensor
they compute one by one, and then some, such as SiLU, GELU and sigmoid, round differently."""
_ROW_MULTIPLE = "rlinf_lite_row_multiple"
"""Attribute of a model, see `_row_multiple`."""
_LAYERS = {"full_attention", "sliding_attention"}
_NO_EFFECT = {"position_ids", "cache_position", "use_cache", "return_dict"} | {
    f"output_{what}" for what in ("attentions", "hidden_states", "router_logits")
}
"""Keyword arguments that some architectures hand to every attention function; none changes what is computed here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What a layer wants beyond softmax(q k^T) v."""

    scaling: float
    window: int | None = None
    """A token sees the last ``window`` tokens, itself included; None: all before it."""
    softcap: float | None = None
    """Scores are ``softcap * tanh(score / softcap)``; None: no cap."""


class Layout(Protocol):
    """Which of the N tokens of a forward pass see which keys."""

    calls: int
    """Layers whose attention asked this layout since it was last set to 0."""
    longest: int
    """Tokens of the longest sequence so far: the largest position + 1."""

    def attend(self, layer: int, q_HND: Tensor, k_KND: Tensor, v_KNE: Tensor, rule: Rule) -> Tensor:
        """The attention of one layer: [N, H, E], in the type of ``q_HND``.

        Args:
            layer: its index.
            q_HND: queries of H heads, not scaled.
            k_KND, v_KNE: keys and values of K heads; H / K query heads share one.
        """


@dataclass(frozen=True, slots=True)
class Mask:
    """Who sees what, as two float tensors that broadcast to scores [A, B, L, G, P]."""

    bias: Tensor
    """0, or -inf where hidden. Every query sees one key at least."""
    seen: Tensor
    """1, or 0 where hidden."""

    @classmethod
    def of(cls, positions: Tensor, num_keys: int, window: int | None, dtype: torch.dtype) -> Mask:
        """The mask [..., ``num_keys``] of queries at ``positions`` [...], where key p has position p."""
        keys, last = torch.arange(num_keys, device=positions.device), positions[..., None]
        hidden = keys > last
        if window is not None:
            hidden |= keys <= last - window
        seen = (~hidden).to(dtype)
        return cls(torch.zeros_like(seen).masked_fill_(hidden, -torch.inf), seen)


# -- the numerics


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Compute softmax(cap(q k^T) + bias) v. A query's bits do not depend on what is computed beside it.

    Args:
        q: [A, B, M, D] float32, scaled; M is L queries, each with G heads that share its keys; M >= MIN_ROWS.
        k, v: [A, B, P, D] and [A, B, P, E], finite; P a multiple of PAD.

    Returns:
        The output [A, B, M, E], and of each query's scores, [A, B, M], the largest and the sum of all exponentials
        divided by the largest one's: the first plus the logarithm of the second is the log-sum-exp.
    """
    scores = _scores(q, k, mask, softcap)
    top = scores.amax(-1, keepdim=True)  # a maximum has no order, so one pass over all keys may find it; a sum has one
    p = _exp(scores.sub_(top), mask).flatten(0, 1)
    total, v = _row_sums(p), v.flatten(0, 1)
    out = torch.bmm(p[..., :BLOCK], v[:, :BLOCK])
    for first in range(BLOCK, p.shape[-1], BLOCK):
        keys = slice(first, first + BLOCK)
        out.baddbmm_(p[..., keys], v[:, keys])
    out = out.div_(total[..., None]).unflatten(0, q.shape[:2])
    return out, top[..., 0], total.view(q.shape[:-1])


def _row_sums(p: Tensor) -> Tensor:
    """Sums over the last dimension, in which a tail of zeros changes nothing: a cumulative sum has one order."""
    sums = p.unflatten(-1, (-1, PAD)).sum(-1)
    return sums[..., 0] if sums.shape[-1] == 1 else sums.cumsum(-1)[..., -1]


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask, softcap: float | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in q, k and v. Their bits need to match nobody else's, so these are plain dense products."""
    scores = _scores(q, k, mask, softcap)
    slope = None if softcap is None else (scores / softcap).square_().neg_().add_(1.0)
    p = _exp(scores.sub_(lse[..., None]), mask)
    dv = p.transpose(2, 3) @ grad
    ds = (grad @ v.transpose(2, 3)).sub_((grad * out).sum(-1, keepdim=True)).mul_(p)
    if slope is not None:  # -inf where hidden, where ds is 0
        ds.mul_(slope.clamp_(min=0.0))
    return ds @ k, ds.transpose(2, 3) @ q, dv


def _scores(q: Tensor, k: Tensor, mask: Mask, softcap: float | None) -> Tensor:
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).unflatten(0, q.shape[:2])
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    _by_query(scores, mask).add_(mask.bias)
    return scores


def _exp(scores: Tensor, mask: Mask) -> Tensor:
    """exp(scores) in place; 0 where hidden."""
    scores.clamp_(min=_LOWEST).exp_()
    _by_query(scores, mask).mul_(mask.seen)
    return scores


def _by_query(scores: Tensor, mask: Mask) -> Tensor:
    return scores.unflatten(2, (mask.bias.shape[-3], -1))


# -- the models


def use(model: PreTrainedModel) -> None:
    """Let ``model`` compute its attention with the function of this module.

    Raises:
        ConfigError: it mixes tokens in a way of its own, which the function would not see.
    """
    config = model.config.get_text_config()
    if not model._supports_attention_backend:
        raise refusal(config, "brings its own attention")
    if model._is_stateful:
        raise refusal(config, "carries a state from token to token beside its attention")
    if other := set(getattr(config, "layer_types", None) or ()) - _LAYERS:
        raise refusal(config, f"has layers of the kind {sorted(other)[0]}")
    model.set_attn_implementation(NAME)
    if not experts.use(model):
        raise refusal(config, "brings its own mixture of experts")
    products.use(model.base_model)
    setattr(model, _ROW_MULTIPLE, _row_multiple(model))


def hidden_states(model: PreTrainedModel, ids_N: Tensor, positions_N: Tensor, layout: Layout) -> Tensor:
    """Hidden states [N, D] after the last norm.

    Args:
        model: prepared by `use`.
        ids_N, positions_N: int64; on a GPU N >= MIN_ROWS.

    Raises:
        ConfigError: not every layer asked the attention function exactly once, or the sequences are too long for
            position embeddings that stay the same.
    """
    config, num = model.config.get_text_config(), len(ids_N)
    check_length(config, layout.longest)
    if ids_N.device.type == "cpu" and (missing := num_missing(model, num)):
        ids_N, positions_N = (functional.pad(x, (0, missing)) for x in (ids_N, positions_N))
        layout = _Padded(layout, num)
    assert len(ids_N) >= MIN_ROWS, "fewer rows are another matrix product, which rounds differently: pad them"
    layout.calls = 0
    found = model.base_model(
        input_ids=ids_N[None], position_ids=positions_N[None], use_cache=False, layout=layout
    ).last_hidden_state[0, :num]
    if layout.calls != config.num_hidden_layers:
        raise refusal(config, f"calls attention {layout.calls} times in {config.num_hidden_layers} layers")
    return found


def _row_multiple(model: PreTrainedModel) -> int:
    """The number of tokens is padded to a multiple of it on a CPU, so that no tensor ends with a part of a vector."""
    parameters = (
        parameter
        for module in model.base_model.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    )
    return VECTORS // math.gcd(VECTORS, *(size for parameter in parameters for size in parameter.shape))


def num_missing(model: PreTrainedModel, num: int) -> int:
    """How many tokens ``model``, prepared by `use`, computes on a CPU beside ``num`` that were asked for."""
    num_padded = products.padded(num)
    return num_padded - num + -num_padded % getattr(model, _ROW_MULTIPLE)


class _Padded:
    """A `Layout` of the first tokens of those that a model computes."""

    def __init__(self, layout: Layout, num: int) -> None:
        self._layout, self._num, self.calls, self.longest = layout, num, 0, layout.longest

    def attend(self, layer: int, q_HND: Tensor, k_KND: Tensor, v_KNE: Tensor, rule: Rule) -> Tensor:
        first = slice(self._num)
        found = self._layout.attend(layer, q_HND[:, first], k_KND[:, first], v_KNE[:, first], rule)
        return functional.pad(found, (0, 0, 0, 0, 0, q_HND.shape[1] - self._num))


def refusal(config: PretrainedConfig, reason: str) -> ConfigError:
    """The error for an architecture that engine and trainer could not compute alike."""
    return ConfigError(
        f"a model of this type {reason}; trainer and builtin engine need attention that goes through transformers' "
        "attention interface, with causal or sliding-window masks only",
        key="model_type",
        value=config.model_type,
        remedy="choose another architecture (Qwen 2 and 3, Llama, Mistral, Gemma, GPT-2 and most others are supported)",
    )


def check_length(config: PretrainedConfig, longest: int) -> None:
    """Refuse rotary embeddings that change for all tokens of a forward pass as soon as one of them is far enough.

    Raises:
        ConfigError: a sequence of ``longest`` tokens is far enough.
    """
    for name, limit in length_limits(config):
        if longest > limit:
            raise ConfigError(
                f"rope_type={name}: a sequence of {longest} tokens, and beyond {limit} the position "
                "embeddings of all others would change with it; set runner.seq_length to at most that"
            )


def length_limits(config: PretrainedConfig) -> list[tuple[str, int]]:
    """Of sequences in `hidden_states`, with the type of rotary embeddings that sets each limit; most have none."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return [
        (kind["rope_type"], kind.get("original_max_position_embeddings") or config.max_position_embeddings)
        for kind in (rope, *(value for value in rope.values() if isinstance(value, dict)))
        if kind.get("rope_type") in ("dynamic", "longrope")
    ]


def longest_sequence(config: PretrainedConfig) -> int | None:
    """Tokens of the longest sequence that a model can take; None: it has no limit that its config tells."""
    known = [limit for _, limit in length_limits(config)]
    if limit := getattr(config, "max_position_embeddings", None):
        known.append(limit)
    return min(known, default=None)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    layout: Layout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: q [1, H, N, D], k and v [1, K, N, D] -> [1, N, H, D]."""
    config = module.config
    if layout is None:
        raise refusal(config, "does not hand keyword arguments to its attention")
    if dropout:
        raise ConfigError(
            f"attention dropout ({dropout}): engine and trainer could not agree; set it to 0 in the model's "
            "config.json (other kinds of dropout may stay), or actor.model.dropout=false"
        )
    unknown = [name for name, given in others.items() if given is not None and name not in _NO_EFFECT]
    if unknown or attention_mask is not None or is_causal is False or not getattr(module, "is_causal", True):
        raise refusal(config, f"has attention with {unknown[0] if unknown else 'a mask of its own'}")
    if sliding_window is None and _slides(config, module.layer_idx):
        raise refusal(config, "does not tell its attention the size of the sliding window")
    layout.calls += 1
    scaling = scaling if scaling is not None else 1.0 / math.sqrt(query.shape[-1])
    rule = Rule(scaling=scaling, window=sliding_window, softcap=softcap)
    return layout.attend(module.layer_idx, query[0], key[0], value[0], rule)[None], None


def _slides(config: PretrainedConfig, layer: int) -> bool:
    if kinds := getattr(config, "layer_types", None):
        return bool(kinds[layer] == "sliding_attention")
    return getattr(config, "sliding_window", None) is not None


AttentionInterface.register(NAME, _attention)
