"""The gradient of every loss over several ranks, against one process, unsharded models and ordinary autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

from rlinf_lite.algorithms import LossInputs, build_algorithm
from rlinf_lite.algorithms.reduce import REDUCTIONS, Responses
from rlinf_lite.config import AlgorithmConfig
from rlinf_lite.errors import ConfigError
from rlinf_lite.types import Column, Normalizers

LOSSES = AlgorithmConfig.model_fields["loss_type"].annotation.__args__
TEMPERATURE = 0.7
EVERY_TERM = {
    "algorithm.ratio_clip_eps": 0.1,
    "algorithm.kl_beta": 0.3,
    "algorithm.entropy_bonus": 0.05,
    "algorithm.importance_sampling_fix": True,
    "algorithm.importance_sampling_mode": "sequence-truncate",
    "algorithm.importance_sampling_clip": 1.1,
    "algorithm.sampling_params.temperature": TEMPERATURE,
    "algorithm.value_clip": 0.2,
    "critic.model.model_type": None,
    "critic.model.precision": "fp32",
    "algorithm.training_batch_size_per_gpu": 4,
}
"""With ten responses, three units: one of two ranks has the last alone."""
GAE = {"algorithm.adv_type": "gae", "algorithm.loss_type": "actor_critic"}
LEFT_OUT = {2, 3, 9}
"""A whole group, and one response of another."""


@pytest.fixture
def critic_dir(model_dirs, tmp_path):
    """A token classifier whose head is not 0, or no gradient would reach what lies below it."""
    config = AutoConfig.from_pretrained(model_dirs["llama"])
    config.num_labels = 1
    torch.manual_seed(4)
    AutoModelForTokenClassification.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def configs(make_config):
    """Every loss, every way to reduce one, and the critic's loss without its clip."""
    made = {}
    for loss, kind in [*((loss, "token-mean") for loss in LOSSES), *(("gspo", kind) for kind in REDUCTIONS)]:
        changes = {"algorithm.loss_type": loss, "algorithm.loss_agg_func": kind}
        made[f"{loss} {kind}"] = make_config({**EVERY_TERM, **changes, **(GAE if loss == "actor_critic" else {})})
    made["without a value clip"] = make_config({**EVERY_TERM, **GAE, "algorithm.value_clip": None})
    return made


class OneProcess:
    """Both models unsharded, one row at a time: what they say of the loss tokens, and columns that lie close to it."""

    def __init__(self, policy_dir, critic_dir, groups):
        self.policy = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float32)
        self.critic = AutoModelForTokenClassification.from_pretrained(critic_dir, dtype=torch.float32).eval()
        rows = [
            (group.prompt.problem.prompt_ids, response.token_ids) for group in groups for response in group.responses
        ]
        kept = [row for index, row in enumerate(rows) if index not in LEFT_OUT]
        self.lengths = [len(response) for _, response in kept]
        said = [self._row(np.array(prompt), response) for prompt, response in kept]
        self.logprob_M, self.entropy_M, self.value_M = (torch.cat(parts) for parts in zip(*said, strict=True))
        size, draw = sum(self.lengths), torch.Generator().manual_seed(0)

        def near(values_M, spread):
            return values_M.detach() + spread * torch.randn(size, generator=draw)

        self.columns = {
            Column.OLD_LOGPROB: near(self.logprob_M, 0.2),
            Column.REF_LOGPROB: near(self.logprob_M, 0.5),
            Column.ENGINE_LOGPROB: near(self.logprob_M, 0.2),
            Column.ADVANTAGE: torch.randn(size, generator=draw),
            Column.OLD_VALUE: near(self.value_M, 0.4),
            Column.RETURN: torch.randn(size, generator=draw),
        }

    def _row(self, prompt, response):
        ids, places = torch.tensor(np.concatenate([prompt, response]))[None], slice(len(prompt) - 1, -1)
        logits = self.policy(input_ids=ids, use_cache=False).logits[0, places] / TEMPERATURE
        logprobs = logits.log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)]
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        return logprobs, entropy, self.critic(input_ids=ids, use_cache=False).logits[0, places, 0]

    def gradients(self, config):
        """(loss, gradient of each parameter) of the policy, and then of the critic, if there is a loss for it."""
        losses = build_algorithm(config.algorithm).losses()
        yield self._gradient(self.policy, losses.policy, logprob_M=self.logprob_M, entropy_M=self.entropy_M)
        if losses.critic is not None:
            yield self._gradient(self.critic, losses.critic, value_M=self.value_M)

    def _gradient(self, model, loss, **outputs):
        lengths = torch.tensor(self.lengths)
        norm = Normalizers(num_tokens=int(lengths.sum()), num_sequences=len(lengths))
        seq_M = Responses.of_lengths(lengths).seq_M
        given = LossInputs(columns=self.columns, seq_M=seq_M, num_responses=len(lengths), norm=norm, **outputs)
        total = loss(given).loss
        names, params = zip(*model.named_parameters(), strict=True)
        return total.item(), dict(zip(names, torch.autograd.grad(total, params, retain_graph=True), strict=True))


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.soak)])
def test_the_gradient_of_every_loss_is_that_of_one_process(ranks, model_dirs, critic_dir, configs, groups, world_size):
    """Ranks with different numbers of tokens; responses of one token; a group of which nothing is trained. Off-policy,
    so that every loss clips or gates.
    """
    one = OneProcess(model_dirs["llama"], critic_dir, groups)
    assert 1 in one.lengths and len(set(one.lengths)) > 4
    results = ranks.run(
        world_size,
        "gradients",
        model_dirs={"policy": model_dirs["llama"], "critic": critic_dir},
        configs=configs,
        groups=groups,
        columns=one.columns,
        left_out=LEFT_OUT,
    )
    largest = {}
    for name, config in configs.items():
        expected = list(one.gradients(config))
        assert len(expected) == (2 if config.algorithm.loss_type == "actor_critic" else 1)
        for model, (loss, gradients) in enumerate(expected):
            of_ranks = [result[name][model] for result in results]
            key = ("loss/total", "loss/value")[model]
            units = {index: unit.shares[key] for found in of_ranks for index, unit in found["units"].items()}
            assert sorted(units) == [0, 1, 2]
            assert sum(units.values()) == pytest.approx(loss, rel=1e-5), name
            scale = max(gradient.abs().max().item() for gradient in gradients.values())
            largest[name, model] = scale
            for found in of_ranks:
                assert found["params"].keys() == gradients.keys()
                for param, gradient in gradients.items():
                    torch.testing.assert_close(
                        found["params"][param],
                        gradient,
                        rtol=2e-5,
                        atol=2e-6 * scale,
                        msg=lambda m, n=name: f"{n}: {m}",
                    )
    assert min(largest.values()) > 1e-4
    of_policy = {round(scale, 9) for (name, model), scale in largest.items() if model == 0}
    assert len(of_policy) == len(LOSSES) - 1 + len(REDUCTIONS) - 1, "only actor and actor_critic share a policy loss"


def test_a_critic_from_a_directory_with_more_labels_is_refused(ranks, model_dirs, configs, groups, tmp_path):
    config = AutoConfig.from_pretrained(model_dirs["llama"])
    config.num_labels = 3
    AutoModelForTokenClassification.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    wrong = (
        r"critic\.model\.model_path=.*: score\.weight is \[3, 20\], a critic, which is .* one label, wants \[1, 20\]"
    )
    with pytest.raises(ConfigError, match=wrong):
        directories = {"policy": model_dirs["llama"], "critic": str(tmp_path)}
        ranks.run(1, "gradients", model_dirs=directories, configs=configs, groups=groups, columns={}, left_out=set())
