"""What one micro-batch adds to the loss: policy loss, KL to the reference, entropy bonus; and its sums for metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from rlinf_lite.algorithms import (
    LOSSES,
    aggregate,
    corrected_kl,
    importance_weights,
    kl_penalty,
    pick,
    token_logprobs,
    token_logprobs_and_entropy,
)
from rlinf_lite.config import AlgorithmConfig
from rlinf_lite.types import MicroBatch, MiniBatch

MicroSums = dict[str, float]
"""Of one micro-batch: ``loss``, ``policy_loss``, ``kl_loss`` are its shares of the mini-batch's value; every other key
is a sum over its loss tokens (``tokens`` of them). ``policy_grad_square`` and ``kl_grad_square`` are of the gradients
of the two terms of the loss in the tokens' log-probs."""


def micro_batch_loss(
    logits_BCV: Tensor,
    targets_BC: Tensor,
    lead: int,
    micro: MicroBatch,
    batch: MiniBatch,
    config: AlgorithmConfig,
    temperature: float,
) -> tuple[Tensor, MicroSums]:
    """The micro-batch's share of the mini-batch loss (shares of all micro-batches and ranks add up), and its sums.

    Args:
        logits_BCV: for the C columns after the first ``lead`` ones, which are prompt in every row.
        targets_BC: the tokens they predict.
    """

    def columns(values_BT: Tensor | None) -> Tensor | None:
        return None if values_BT is None else values_BT[:, lead:].to(logits_BCV.device)

    def share(values_BC: Tensor) -> Tensor:
        return aggregate(values_BC, mask, config.loss_agg_func, batch.num_tokens, batch.num_sequences)

    mask = micro.loss_mask_BT[:, lead:].to(logits_BCV.device)
    rollout, reference = columns(micro.rollout_logprobs_BT), columns(micro.ref_logprobs_BT)
    entropy_BC = None
    if config.entropy_bonus or config.calculate_entropy:
        logprobs, entropy_BC = token_logprobs_and_entropy(logits_BCV, targets_BC, temperature)
    else:
        logprobs = token_logprobs(logits_BCV, targets_BC, temperature)
    old = columns(micro.old_logprobs_BT)
    old = logprobs.detach() if old is None else old
    weights = None
    if rollout is not None and config.importance_sampling_fix:
        weights = importance_weights(old, rollout, config.importance_sampling_clip)
    terms = pick(LOSSES, "algorithm.loss_type", config.loss_type)(
        logprobs,
        old,
        micro.advantages_BT[:, lead:].to(logits_BCV.device),
        clip_ratio_low=config.ratio_clip_eps if config.clip_ratio_low is None else config.clip_ratio_low,
        clip_ratio_high=config.ratio_clip_eps if config.clip_ratio_high is None else config.clip_ratio_high,
        clip_ratio_c=config.clip_ratio_c,
        weights_BT=weights,
    )
    loss = share(terms.loss_BT)
    sums = {
        "policy_loss": loss.item(),
        "tokens": mask.sum().item(),
        "ratio": _masked_sum(terms.ratio_BT, mask),
        "clipped": _masked_sum((terms.clipped_low_BT | terms.clipped_high_BT).float(), mask),
        "dual_clipped": _masked_sum(terms.dual_clipped_BT.float(), mask),
        "update_kl": _masked_sum(kl_penalty(old, logprobs.detach(), "low_var_kl"), mask),
    }
    if reference is not None:
        if config.kl_importance_correction:
            kl_BC = corrected_kl(logprobs, reference, old, config.kl_penalty_type)
        else:
            kl_BC = kl_penalty(logprobs, reference, config.kl_penalty_type)
        kl = share(kl_BC)
        sums |= {"kl_loss": kl.item(), "ref_kl": _masked_sum(kl_BC, mask)}
        sums |= {
            "policy_grad_square": _grad_square(loss, logprobs),
            "kl_grad_square": _grad_square(config.kl_beta * kl, logprobs),
        }
        loss = loss + config.kl_beta * kl
    if entropy_BC is not None:
        if config.entropy_bonus:
            loss = loss - config.entropy_bonus * share(entropy_BC)
        sums["entropy"] = _masked_sum(entropy_BC, mask)
    if rollout is not None:
        # Where the old ones are the engine's own, the pass of the update stands for the trainer.
        trainer = old if config.recompute_logprobs else logprobs.detach()
        sums["rollout_gap"] = _masked_sum((trainer - rollout).abs(), mask)
    return loss, sums | {"loss": loss.item()}


def _grad_square(term: Tensor, logprobs: Tensor) -> float:
    """Squared L2 norm of the gradient of ``term`` in the log-probs; does not go through the model."""
    (grad,) = torch.autograd.grad(term, logprobs, retain_graph=True)
    return grad.double().square().sum().item()


def _masked_sum(values: Tensor, mask: Tensor) -> float:
    return torch.where(mask > 0, values.detach(), 0.0).sum().item()
