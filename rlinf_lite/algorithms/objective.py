"""The loss of a policy on one unit: token losses, importance weights, KL term and entropy bonus, with their metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlinf_lite.algorithms.algorithm import LossInputs, LossOutputs
from rlinf_lite.algorithms.kl import corrected_kl, kl_penalty
from rlinf_lite.algorithms.mismatch import importance_weights
from rlinf_lite.algorithms.reduce import Reduction, Responses
from rlinf_lite.config import AlgorithmConfig
from rlinf_lite.types import Column


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLosses:
    """What a module in `losses` makes of a unit."""

    loss_M: Tensor
    """[M], differentiable."""
    metrics: Mapping[str, Tensor]
    """[M] each, detached; averaged over the loss tokens of the mini-batch."""


TokenLoss = Callable[[LossInputs, AlgorithmConfig], TokenLosses]


class PolicyLoss:
    """`Loss` of a policy: a token loss, and the terms that the config adds to it."""

    def __init__(self, token_loss: TokenLoss, config: AlgorithmConfig) -> None:
        self._token_loss, self._config = token_loss, config
        self._reduction = Reduction(kind=config.loss_agg_func, max_tokens=config.sampling_params.max_new_tokens)
        self.wants_entropy = bool(config.entropy_bonus or config.calculate_entropy)

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        config, responses = self._config, Responses(inputs.seq_M, inputs.num_responses)
        logprob_M, entropy_M = inputs.logprob_M, inputs.entropy_M
        assert logprob_M is not None and (entropy_M is not None or not self.wants_entropy)

        def reduce(values_M: Tensor) -> Tensor:
            return self._reduction(values_M, responses, inputs.norm)

        terms = self._token_loss(inputs, config)
        old_M = inputs.columns[Column.OLD_LOGPROB]
        means = {**terms.metrics, "policy/update_kl": kl_penalty(old_M, logprob_M.detach(), "low_var_kl")}
        loss_M = terms.loss_M
        if config.importance_sampling_fix:
            weights_M = _importance_weights(inputs, responses, config)
            loss_M, means["policy/importance_weight"] = loss_M * weights_M, weights_M
        loss = reduce(loss_M)
        shares = {"loss/policy": loss.detach()}
        if config.kl_beta and not config.kl_in_reward:
            kl_M = _kl(inputs, config)
            kl = reduce(kl_M)
            shares |= {"loss/kl": kl.detach()} | _grad_squares(loss, config.kl_beta * kl, logprob_M)
            means["policy/kl"] = kl_M
            loss = loss + config.kl_beta * kl
        if entropy_M is not None:
            if config.entropy_bonus:
                loss = loss - config.entropy_bonus * reduce(entropy_M)
            means["policy/entropy"] = entropy_M
        if (engine_M := inputs.columns.get(Column.ENGINE_LOGPROB)) is not None:
            # Not of the old log-probs, which may be the engine's own. In the first mini-batch the weights are the
            # engine's, and that one is logged.
            means["policy/rollout_logprob_gap"] = (logprob_M - engine_M).abs()
        return LossOutputs(loss=loss, shares=shares | {"loss/total": loss.detach()}, token_sums=token_sums(means))


def token_sums(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum each metric, [M], over the unit's loss tokens: what `LossOutputs.token_sums` holds."""
    return {name: values_M.detach().float().sum() for name, values_M in metrics.items()}


def _importance_weights(inputs: LossInputs, responses: Responses, config: AlgorithmConfig) -> Tensor:
    return importance_weights(
        inputs.columns[Column.OLD_LOGPROB],
        inputs.columns[Column.ENGINE_LOGPROB],
        responses,
        mode=config.importance_sampling_mode,
        clip=config.importance_sampling_clip,
    )


def _kl(inputs: LossInputs, config: AlgorithmConfig) -> Tensor:
    """The KL penalty of each token."""
    logprob_M, ref_M = inputs.logprob_M, inputs.columns[Column.REF_LOGPROB]
    assert logprob_M is not None
    if config.kl_importance_correction:
        return corrected_kl(logprob_M, ref_M, inputs.columns[Column.OLD_LOGPROB], config.kl_penalty_type)
    return kl_penalty(logprob_M, ref_M, config.kl_penalty_type)


def _grad_squares(policy: Tensor, kl: Tensor, logprob_M: Tensor) -> dict[str, Tensor]:
    """Squared L2 norms of the gradients of both terms with respect to the log-probs, for ``loss/kl_grad_fraction``."""

    def square(term: Tensor) -> Tensor:
        (grad_M,) = torch.autograd.grad(term, logprob_M, retain_graph=True)
        return grad_M.double().square().sum()

    return {"_policy_grad_square": square(policy), "_kl_grad_square": square(kl)}
