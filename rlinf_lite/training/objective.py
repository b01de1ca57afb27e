"""The loss of one micro-batch: policy loss, KL penalty and entropy bonus, with the sums that metrics are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlinf_lite.algorithms import (
    LOSSES,
    PolicyLoss,
    aggregate,
    corrected_kl,
    importance_weights,
    kl_penalty,
    pick,
    token_logprobs,
    token_logprobs_and_entropy,
)
from rlinf_lite.config import AlgorithmConfig
from rlinf_lite.types import MicroBatch, RankBatch

MicroSums = dict[str, float]
"""Of one micro-batch: ``loss``, ``policy_loss`` and ``kl_loss`` are what it adds to the mini-batch's value; every other
key is a sum over its loss tokens (``tokens`` of them). ``policy_grad_square`` and ``kl_grad_square`` are of the
gradients of the two terms of the loss with respect to the tokens' log-probs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Columns:
    """A micro-batch's values in the columns that have logits, on the device of the logits."""

    mask_BC: Tensor
    advantages_BC: Tensor
    old_BC: Tensor | None
    reference_BC: Tensor | None
    rollout_BC: Tensor | None


def micro_batch_loss(
    logits_BCV: Tensor,
    targets_BC: Tensor,
    lead: int,
    micro: MicroBatch,
    batch: RankBatch,
    config: AlgorithmConfig,
    temperature: float,
) -> tuple[Tensor, MicroSums]:
    """What the micro-batch adds to the mini-batch loss (over all micro-batches and ranks these add up), and its sums.

    Args:
        logits_BCV: for the C columns after the first ``lead`` ones, which are prompt in every row.
        targets_BC: the tokens they predict.
    """

    def reduce(values_BC: Tensor) -> Tensor:
        return aggregate(values_BC, columns.mask_BC, config.loss_agg_func, batch.num_tokens, batch.num_sequences)

    columns = _columns(micro, lead, logits_BCV.device)
    entropy_BC = None
    if config.entropy_bonus or config.calculate_entropy:
        logprobs_BC, entropy_BC = token_logprobs_and_entropy(logits_BCV, targets_BC, temperature)
    else:
        logprobs_BC = token_logprobs(logits_BCV, targets_BC, temperature)
    old_BC = logprobs_BC.detach() if columns.old_BC is None else columns.old_BC
    terms = _policy_terms(logprobs_BC, old_BC, columns, config)
    loss = reduce(terms.loss_BT)
    sums = {"policy_loss": loss.item(), **_policy_sums(terms, logprobs_BC, old_BC, columns.mask_BC)}
    if columns.reference_BC is not None:
        kl_BC = _kl(logprobs_BC, columns.reference_BC, old_BC, config)
        kl_loss = reduce(kl_BC)
        sums |= {"kl_loss": kl_loss.item(), "ref_kl": _masked_sum(kl_BC, columns.mask_BC)}
        sums |= {
            "policy_grad_square": _grad_square(loss, logprobs_BC),
            "kl_grad_square": _grad_square(config.kl_beta * kl_loss, logprobs_BC),
        }
        loss = loss + config.kl_beta * kl_loss
    if entropy_BC is not None:
        if config.entropy_bonus:
            loss = loss - config.entropy_bonus * reduce(entropy_BC)
        sums["entropy"] = _masked_sum(entropy_BC, columns.mask_BC)
    if columns.rollout_BC is not None:
        # With old log-probs from the engine itself, the update's own forward pass is the trainer's side of the gap.
        trainer_BC = old_BC if config.recompute_logprobs else logprobs_BC.detach()
        sums["rollout_gap"] = _masked_sum((trainer_BC - columns.rollout_BC).abs(), columns.mask_BC)
    return loss, sums | {"loss": loss.item()}


def _columns(micro: MicroBatch, lead: int, device: torch.device) -> _Columns:
    def take(values_BT: Tensor) -> Tensor:
        return values_BT[:, lead:].to(device)

    def take_if_any(values_BT: Tensor | None) -> Tensor | None:
        return None if values_BT is None else take(values_BT)

    return _Columns(
        mask_BC=take(micro.loss_mask_BT),
        advantages_BC=take(micro.advantages_BT),
        old_BC=take_if_any(micro.old_logprobs_BT),
        reference_BC=take_if_any(micro.ref_logprobs_BT),
        rollout_BC=take_if_any(micro.rollout_logprobs_BT),
    )


def _policy_terms(logprobs_BC: Tensor, old_BC: Tensor, columns: _Columns, config: AlgorithmConfig) -> PolicyLoss:
    weights_BC = None
    if columns.rollout_BC is not None and config.importance_sampling_fix:
        weights_BC = importance_weights(old_BC, columns.rollout_BC, config.importance_sampling_clip)
    return pick(LOSSES, "algorithm.loss_type", config.loss_type)(
        logprobs_BC,
        old_BC,
        columns.advantages_BC,
        clip_ratio_low=config.ratio_clip_eps if config.clip_ratio_low is None else config.clip_ratio_low,
        clip_ratio_high=config.ratio_clip_eps if config.clip_ratio_high is None else config.clip_ratio_high,
        clip_ratio_c=config.clip_ratio_c,
        weights_BT=weights_BC,
    )


def _policy_sums(terms: PolicyLoss, logprobs_BC: Tensor, old_BC: Tensor, mask_BC: Tensor) -> MicroSums:
    return {
        "tokens": mask_BC.sum().item(),
        "ratio": _masked_sum(terms.ratio_BT, mask_BC),
        "clipped": _masked_sum((terms.clipped_low_BT | terms.clipped_high_BT).float(), mask_BC),
        "dual_clipped": _masked_sum(terms.dual_clipped_BT.float(), mask_BC),
        "update_kl": _masked_sum(kl_penalty(old_BC, logprobs_BC.detach(), "low_var_kl"), mask_BC),
    }


def _kl(logprobs_BC: Tensor, reference_BC: Tensor, old_BC: Tensor, config: AlgorithmConfig) -> Tensor:
    """The KL penalty of each token."""
    if config.kl_importance_correction:
        return corrected_kl(logprobs_BC, reference_BC, old_BC, config.kl_penalty_type)
    return kl_penalty(logprobs_BC, reference_BC, config.kl_penalty_type)


def _grad_square(term: Tensor, logprobs_BC: Tensor) -> float:
    """Squared L2 norm of the gradient of ``term`` with respect to the log-probs; does not go through the model."""
    (grad,) = torch.autograd.grad(term, logprobs_BC, retain_graph=True)
    return grad.double().square().sum().item()


def _masked_sum(values_BC: Tensor, mask_BC: Tensor) -> float:
    return torch.where(mask_BC > 0, values_BC.detach(), 0.0).sum().item()
