"""The ``algorithm`` section: groups, batches, the loss and how responses are sampled."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import Field

from rlinf_lite.config.fields import (
    MOST_COUNT,
    Count,
    CountOrZero,
    Fraction,
    Neutral,
    NonNegative,
    PathText,
    PositiveFraction,
    Section,
    follows,
)


class SamplingConfig(Section):
    do_sample: bool = True
    """false: greedy decoding."""
    temperature: float = 1.0
    """Divides the logits before sampling; 1 samples from the model as it is."""
    top_k: Annotated[int, Ge(-1), Le(MOST_COUNT)] = -1
    """Sample from the k most likely tokens; -1 or 0: from all."""
    top_p: PositiveFraction = 1.0
    """Sample from the smallest set of most likely tokens whose probabilities sum to at least this."""
    min_p: Fraction = 0.0
    """Sample from tokens whose probability is at least this times that of the most likely one; 0: off."""
    repetition_penalty: Annotated[float, Ge(0.01), Le(100)] = 1.0
    """Above 1: tokens that have occurred before become less likely; 1: off."""
    max_new_tokens: Count = 1024
    """Largest number of tokens in a response."""


class ValidationSamplingConfig(SamplingConfig):
    """As `SamplingConfig`, but greedy unless set otherwise, and as long as in training."""

    do_sample: bool = False
    """false: greedy decoding."""
    max_new_tokens: Count = follows("algorithm.sampling_params.max_new_tokens")
    """Largest number of tokens in a response."""


class AlgorithmConfig(Section):
    group_size: Count = 8
    """Responses sampled per prompt."""
    n_minibatches: Count = 1
    """Optimizer steps per rollout batch."""
    training_batch_size_per_gpu: Count = 8
    """Rows of a micro-batch in training, unless ``runner.enable_dynamic_batch_size``."""
    logprob_forward_micro_batch_size: Count = 8
    """Rows of a micro-batch when log-probs are recomputed, unless ``runner.enable_dynamic_batch_size``."""
    recompute_logprobs: bool = True
    """Old log-probs are computed with the actor's weights before the update, unless the engine's are known to be
    bitwise identical (see docs/exactness.md); false: always taken from the rollout engine."""
    shuffle_rollout: bool = False
    """Shuffle the rows before they are split into mini-batches (a pure function of seed and step)."""
    path: Neutral[PathText | None] = None
    """An algorithm of your own instead of ``adv_type`` and ``loss_type``: ``my_pkg.my_algo:MyAlgorithm`` or
    ``path/to/my_algo.py:MyAlgorithm``."""
    loss_type: Literal["actor", "gspo", "gmpo", "cispo", "sapo", "actor_critic"] = "actor"
    """Loss of the policy. ``actor``: clipped ratio per token; ``gspo``: per response; ``gmpo``: the mean of clipped
    log-ratios; ``cispo``: policy gradient with a
    clipped weight; ``sapo``: a soft gate instead of a clip; ``actor_critic``: as ``actor``, with ``gae``."""
    loss_agg_func: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"] = (
        "token-mean"
    )
    """How per-token losses become one number: mean over all tokens, or mean over responses of each response's sum,
    mean, or sum divided by ``sampling_params.max_new_tokens``."""
    kl_beta: NonNegative = 0.0
    """Weight of the KL against the frozen base model; 0: no reference model is built."""
    kl_in_reward: bool = False
    """Subtract the KL from the reward instead of adding it to the loss."""
    kl_penalty_type: Literal["kl", "abs", "mse", "low_var_kl"] = "low_var_kl"
    """``low_var_kl`` (k3; its gradient is that of KL(reference || policy)), ``mse`` (k2; that of KL(policy ||
    reference)) or ``abs`` (twice that of the total variation). ``kl`` (k1) has an expected gradient of 0 in a loss:
    only with ``kl_importance_correction``. ``k1``, ``k2`` and ``k3`` are taken as names, too."""
    kl_importance_correction: bool = False
    """Multiply the KL term by the ratio of the policy to the one that sampled the tokens, as DeepSeek-V3.2 does (TRL:
    ``use_bias_correction_kl``). Its gradient is then that of KL(policy || reference), also with several mini-batches,
    for ``kl``, ``mse`` and ``low_var_kl`` alike."""
    ratio_clip_eps: Fraction = 0.2
    """The ratio of new to old policy is clipped to 1 - eps and 1 + eps."""
    clip_ratio_low: Fraction | None = None
    """Lower clip; null: ``ratio_clip_eps`` (``cispo``: none)."""
    clip_ratio_high: Annotated[float, Ge(0), Le(10)] | None = None
    """Upper clip; null: ``ratio_clip_eps``."""
    clip_ratio_c: Annotated[float, Gt(1)] | None = None
    """Dual clip for negative advantages; null: off."""
    sapo_temperature_pos: Annotated[float, Gt(0)] = 1.0
    """``sapo`` only: steepness of the gate for positive advantages."""
    sapo_temperature_neg: Annotated[float, Gt(0)] = 1.05
    """``sapo`` only: steepness of the gate for other advantages."""
    gamma: PositiveFraction = 1.0
    """Discount per token, for ``reinpp``, ``reinpp_baseline`` and ``gae``."""
    gae_lambda: Fraction = 1.0
    """``gae`` only: 1 sums rewards up to the end, 0 takes the critic's value after one token."""
    value_clip: Annotated[float, Gt(0)] | None = 0.2
    """``gae`` only: how far a value may move from the one before the update without a larger loss; null: any."""
    critic_warmup_steps: CountOrZero = 0
    """``gae`` only: in the first steps only the critic is trained."""
    entropy_bonus: NonNegative = 0.0
    """Weight of the policy's entropy, which is added to the objective."""
    calculate_entropy: Neutral[bool] = False
    """Log the policy's entropy (costs a pass over the logits)."""
    adv_type: Literal["grpo", "dr_grpo", "rloo", "reinpp", "reinpp_baseline", "maxrl", "gae"] = "grpo"
    """How rewards become advantages. ``grpo``: minus their group's mean, divided by its standard deviation;
    ``dr_grpo``: not divided; ``rloo``: minus the mean of the others in the group; ``maxrl``: minus the mean, divided by
    it; ``reinpp``: REINFORCE++, returns normalized over the batch; ``reinpp_baseline``: the same after subtracting the
    group's mean; ``gae``: with the values of a critic."""
    normalize_advantages: bool = False
    """Normalize advantages over all loss tokens of the batch (``reinpp`` and ``reinpp_baseline`` always do)."""
    importance_sampling_fix: bool = False
    """Weight each token by exp(trainer - engine log-prob), limited by ``importance_sampling_clip``."""
    importance_sampling_mode: Literal["token-truncate", "token-mask", "sequence-truncate", "sequence-mask"] = (
        "token-truncate"
    )
    """A weight per token, or the product over a response; one above ``importance_sampling_clip`` is set to that, or to
    0."""
    importance_sampling_clip: Annotated[float, Gt(0)] = 2.0
    """Largest weight of ``importance_sampling_fix``."""
    overlong_buffer: CountOrZero = 0
    """DAPO's soft punishment: over the last so many tokens before ``sampling_params.max_new_tokens`` the reward falls
    linearly; 0: off."""
    overlong_penalty: NonNegative = 1.0
    """What ``overlong_buffer`` takes from the reward of a response of ``max_new_tokens`` tokens."""
    mask_truncated: bool = False
    """Leave truncated responses out of the loss; their rewards still count in their group."""
    dynamic_sampling: bool = False
    """Drop groups whose rewards are all equal, and sample others in their place (DAPO)."""
    max_sampling_rounds: Count = 10
    """``dynamic_sampling`` only: how often a step samples at most; then it trains on the groups that it has."""
    sampling_params: SamplingConfig = Field(default_factory=SamplingConfig)
    val_sampling_params: ValidationSamplingConfig = Field(default_factory=ValidationSamplingConfig)
