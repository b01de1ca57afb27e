"""An algorithm of your own: `algorithm.path: docs/examples/my_algorithm.py:Reinforce`.

Plain REINFORCE with a baseline: the advantage of every token of a response is its reward minus the mean
reward of all responses of the step, and the loss is -advantage * log-prob. On-policy: one mini-batch, no old log-probs.
"""

import torch

from rlinf_lite.algorithms.algorithm import Credit, Losses, LossOutputs
from rlinf_lite.types import Column


class Reinforce:
    needs = frozenset()  # no column beyond the log-probs of the policy itself

    def __init__(self, config):
        self.config = config  # the section `algorithm` of the config

    def admit(self, graded):
        return torch.ones(len(graded.rewards_PG), dtype=torch.bool)

    def credit(self, graded):
        rewards, counted = graded.rewards_PG, graded.counted_PG
        advantages = torch.where(counted, rewards - rewards[counted].mean(), 0.0)
        per_token = advantages.reshape(-1).repeat_interleave(graded.num_tokens_PG.reshape(-1))
        return Credit(columns={Column.ADVANTAGE: per_token.float()}, trained_PG=counted)

    def losses(self):
        return Losses(policy=Loss())


class Loss:
    wants_entropy = False

    def __call__(self, inputs):
        loss = -(inputs.columns[Column.ADVANTAGE] * inputs.logprob_M).sum() / max(inputs.norm.num_tokens, 1)
        return LossOutputs(loss=loss, shares={"loss/total": loss.detach()}, token_sums={})
