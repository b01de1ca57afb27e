"""Each policy loss and its gradient equal those of TRL's `GRPOTrainer` on the same tensors, to 1e-6 relative."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rlinf_lite.algorithms.algorithm import LossInputs
from rlinf_lite.algorithms.losses import token_loss
from rlinf_lite.algorithms.objective import PolicyLoss
from rlinf_lite.config import AlgorithmConfig
from rlinf_lite.types import Column, Normalizers

trl = pytest.importorskip("trl", reason="TRL is in the extra 'bench'")
from accelerate import Accelerator  # noqa: E402
from trl.experimental.gmpo import GMPOTrainer  # noqa: E402

LENGTHS = [9, 1, 12, 7]
VOCABULARY, LONGEST, LIMIT = 7, max(LENGTHS), 13


class Logits(nn.Module):
    """A model with one parameter: the logits of each completion token. Called as TRL calls a model."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        logprobs = self.logits.log_softmax(-1)
        completion = input_ids[:, -LONGEST:]
        return SimpleNamespace(
            log_probs=logprobs.gather(2, completion[..., None])[..., 0],
            entropy=-(logprobs.exp() * logprobs).sum(-1),
        )


def numbers():
    """Tensors of four responses, padded to LONGEST: ratios inside and outside every clip range, in float64."""
    generator = torch.Generator().manual_seed(3)
    shape = (len(LENGTHS), LONGEST)
    logits = torch.randn(*shape, VOCABULARY, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCABULARY, shape, generator=generator)
    logprobs = logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]
    noisy = [logprobs + scale * torch.randn(shape, generator=generator, dtype=torch.float64) for scale in (0.8, 0.5)]
    weights = torch.rand(shape, generator=generator, dtype=torch.float64) * 2
    mask = torch.arange(LONGEST)[None] < torch.tensor(LENGTHS)[:, None]
    advantages = torch.tensor([1.3, -0.7, -1.1, 0.4], dtype=torch.float64)
    return logits, targets, mask, {"old": noisy[0], "ref": noisy[1], "weights": weights}, advantages


def theirs(kind: type = trl.GRPOTrainer, **options: object):
    """Loss of ``kind._compute_loss``, and its gradient by the logits."""
    logits, targets, mask, others, advantages = numbers()
    model = Logits(logits)
    trainer = kind.__new__(kind)
    args = {"delta": None, "use_bias_correction_kl": False, "report_to": []}
    args |= {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "steps_per_generation": 1}
    settings = {
        "model": model,
        "accelerator": Accelerator(cpu=True),
        "args": SimpleNamespace(**args | {name: options.pop(name) for name in args if name in options}),
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "use_vllm": False,
        "vllm_importance_sampling_correction": True,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": LIMIT,
        "use_adaptive_entropy": False,
        "_entropy_bonus_enabled": bool(options.get("entropy_coef")),
        **options,
    }
    for name, value in settings.items():
        setattr(trainer, name, value)
    loss = trainer._compute_loss(
        model,
        {
            "prompt_ids": torch.zeros(len(LENGTHS), 2, dtype=torch.long),
            "prompt_mask": torch.ones(len(LENGTHS), 2, dtype=torch.long),
            "completion_ids": targets,
            "completion_mask": mask.long(),
            "advantages": advantages,
            "old_per_token_logps": others["old"],
            "ref_per_token_logps": others["ref"],
            "importance_sampling_ratio": others["weights"],
            "num_items_in_batch": mask.sum(),
        },
    )
    loss.backward()
    return loss.detach(), model.logits.grad


def ours(**options: object):
    """Our loss of the same tensors in one unit, and its gradient by the logits."""
    logits, targets, mask, others, advantages = numbers()
    model = Logits(logits)
    outputs = model(input_ids=targets)
    config = AlgorithmConfig(**options)
    config.sampling_params.max_new_tokens = LIMIT
    inputs = LossInputs(
        logprob_M=outputs.log_probs[mask],
        entropy_M=outputs.entropy[mask],
        columns={
            Column.ADVANTAGE: advantages[:, None].expand(mask.shape)[mask],
            Column.OLD_LOGPROB: others["old"][mask],
            Column.REF_LOGPROB: others["ref"][mask],
            # exp(old - engine) is the weight that TRL is given.
            Column.ENGINE_LOGPROB: (others["old"] - others["weights"].log())[mask],
        },
        seq_M=torch.arange(len(LENGTHS))[:, None].expand(mask.shape)[mask],
        num_responses=len(LENGTHS),
        norm=Normalizers(num_tokens=sum(LENGTHS), num_sequences=len(LENGTHS)),
    )
    loss = PolicyLoss(token_loss(config.loss_type), config)(inputs).loss
    loss.backward()
    return loss.detach(), model.logits.grad


CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3}
TRL_CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.3}
KL = {"kl_beta": 0.3}
CASES = {
    "actor, token-mean": ({**CLIP}, {**TRL_CLIP, "loss_type": "dapo"}),
    "actor, seq-mean-token-mean": (
        {**CLIP, "loss_agg_func": "seq-mean-token-mean"},
        {**TRL_CLIP, "loss_type": "grpo"},
    ),
    "actor, seq-mean-token-sum": ({**CLIP, "loss_agg_func": "seq-mean-token-sum"}, {**TRL_CLIP, "loss_type": "luspo"}),
    "actor, seq-mean-token-sum-norm": (
        {**CLIP, "loss_agg_func": "seq-mean-token-sum-norm"},
        {**TRL_CLIP, "loss_type": "dr_grpo"},
    ),
    "actor, dual clip": ({**CLIP, "clip_ratio_c": 1.5}, {**TRL_CLIP, "delta": 1.5, "loss_type": "dapo"}),
    "actor_critic": ({**CLIP, "loss_type": "actor_critic"}, {**TRL_CLIP, "loss_type": "dapo"}),
    "gspo": (
        {**CLIP, "loss_type": "gspo", "loss_agg_func": "seq-mean-token-mean"},
        {**TRL_CLIP, "loss_type": "grpo", "importance_sampling_level": "sequence"},
    ),
    "gmpo": (
        {"loss_type": "gmpo", "ratio_clip_eps": 0.4, "loss_agg_func": "seq-mean-token-mean"},
        {"kind": GMPOTrainer, "epsilon_low": 0.4, "epsilon_high": 0.4, "loss_type": "grpo"},
    ),
    "cispo": ({"loss_type": "cispo", "clip_ratio_high": 0.3}, {"epsilon_high": 1.3, "loss_type": "cispo"}),
    "sapo": ({"loss_type": "sapo", "loss_agg_func": "seq-mean-token-mean"}, {"loss_type": "sapo"}),
    "sapo, other temperatures": (
        {
            "loss_type": "sapo",
            "loss_agg_func": "seq-mean-token-mean",
            "sapo_temperature_pos": 2.0,
            "sapo_temperature_neg": 3.0,
        },
        {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0},
    ),
    "KL": ({**CLIP, **KL}, {**TRL_CLIP, "beta": 0.3, "loss_type": "dapo"}),
    "corrected KL": (
        {**CLIP, **KL, "kl_importance_correction": True},
        {**TRL_CLIP, "beta": 0.3, "use_bias_correction_kl": True, "loss_type": "dapo"},
    ),
    "entropy bonus": ({**CLIP, "entropy_bonus": 0.2}, {**TRL_CLIP, "entropy_coef": 0.2, "loss_type": "dapo"}),
    "importance weights": (
        {**CLIP, "importance_sampling_fix": True, "importance_sampling_clip": 100.0},
        {**TRL_CLIP, "use_vllm": True, "loss_type": "dapo"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_those_of_trl(case):
    mine, trls = CASES[case]
    (loss, gradient), (their_loss, their_gradient) = ours(**mine), theirs(**trls)
    torch.testing.assert_close(loss, their_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-6, atol=1e-12)
    assert gradient.abs().max() > 1e-3


def test_the_numbers_reach_every_clip():
    """Else equality would say nothing about them."""
    _, _, mask, others, advantages = numbers()
    logits, targets, *_ = numbers()
    logprobs = Logits(logits)(input_ids=targets).log_probs
    ratio, rising = (logprobs - others["old"]).exp()[mask], (advantages > 0)[:, None].expand(mask.shape)[mask]
    for clipped in (ratio > 1.3, ratio < 0.8):
        assert (clipped & rising).any() and (clipped & ~rising).any()
    assert ((ratio > 1.5) & ~rising).any(), "dual clip"
