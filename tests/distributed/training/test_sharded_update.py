"""The sharded update against a single process, an unsharded transformers model and ordinary autograd, row by row."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlinf_lite.data.batching import arrange

TOLERANCE = {"rtol": 2e-5, "atol": 2e-7}
"""Both sides compute in float32 and differ only in the order of sums (padding, micro-batches, ranks)."""


def row_logits(model, rollout):
    """Logits [R, V] that predict the response's tokens, from a forward pass of this row alone, unpadded."""
    ids = torch.cat([torch.from_numpy(rollout.prompt_ids), torch.from_numpy(rollout.response_ids)])
    return model(input_ids=ids[None], use_cache=False).logits[0, len(rollout.prompt_ids) - 1 : -1]


def row_logprobs(model, rollout, temperature):
    all_logprobs = (row_logits(model, rollout) / temperature).log_softmax(-1)
    return all_logprobs[torch.arange(len(rollout.response_ids)), torch.from_numpy(rollout.response_ids)]


def reference_update(model_dir, config, rollouts, advantages):
    """One step, written out: GRPO's clipped loss, k1 KL, entropy bonus, clipping by norm, AdamW."""
    algorithm, optim = config.algorithm, config.actor.optim
    temperature = algorithm.sampling_params.temperature
    model, base = (AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32) for _ in range(2))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=optim.lr,
        betas=(optim.adam_beta1, optim.adam_beta2),
        eps=optim.adam_eps,
        weight_decay=optim.weight_decay,
    )
    with torch.no_grad():
        old = [row_logprobs(model, rollout, temperature) for rollout in rollouts]
        ref = [row_logprobs(base, rollout, temperature) for rollout in rollouts]
    norms, losses = [], []
    for rows in arrange(len(rollouts), 1, config):
        num_tokens = sum(len(rollouts[row].response_ids) for row in rows)
        loss = torch.zeros(())
        for row in rows:
            logprobs = row_logprobs(model, rollouts[row], temperature)
            ratio = (logprobs - old[row]).exp()
            clipped = ratio.clamp(1 - algorithm.ratio_clip_eps, 1 + algorithm.ratio_clip_eps)
            token_loss = -torch.minimum(ratio * advantages[row], clipped * advantages[row])
            token_loss = token_loss + algorithm.kl_beta * (logprobs - ref[row])
            scaled = row_logits(model, rollouts[row]) / temperature
            entropy = torch.distributions.Categorical(logits=scaled).entropy()
            token_loss = token_loss - algorithm.entropy_bonus * entropy
            loss = loss + {
                "token-mean": token_loss.sum() / num_tokens,
                "seq-mean-token-sum": token_loss.sum() / len(rows),
                "seq-mean-token-mean": token_loss.mean() / len(rows),
            }[algorithm.loss_agg_func]
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad or torch.inf).item())
        optimizer.step()
        losses.append(loss.item())
    moments = {name: optimizer.state[param] for name, param in model.named_parameters()}
    return dict(model.named_parameters()), moments, norms, losses


def assert_follows_reference(results, expected):
    params, moments, norms, losses = expected
    for result in results:
        assert result["model"].keys() == params.keys() == result["optim"].keys()
        for name, param in params.items():
            torch.testing.assert_close(result["model"][name], param.detach(), **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
            for key in ("exp_avg", "exp_avg_sq", "step"):
                found = result["optim"][name][key]
                torch.testing.assert_close(found, moments[name][key], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
        assert [report.grad_norm for report in result["reports"]] == pytest.approx(norms, rel=1e-5)
    for update, loss in enumerate(losses):
        sums = [s for result in results for s in result["reports"][update].sums.items()]
        assert sorted(index for index, _ in sums) == list(range(len(sums)))
        assert sum(s["loss"] for _, s in sums) == pytest.approx(loss, rel=1e-4, abs=1e-6)


def assert_same_state(one, other):
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][name]), name
        for key, value in one["optim"][name].items():
            assert torch.equal(value, other["optim"][name][key]), (name, key)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("loss_agg_func", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_equals_one_process(ranks, model_dirs, make_config, rollouts, advantages, world_size, loss_agg_func):
    """Nine rows make five micro-batches: neither 2 nor 3 ranks share them evenly, so one rank idles at the end."""
    config = make_config({"algorithm.loss_agg_func": loss_agg_func})
    given = {"model_dir": model_dirs["llama"], "config": config, "rollouts": rollouts[:9], "advantages": advantages[:9]}
    results = ranks.run(world_size, "train", **given)
    assert_follows_reference(results, reference_update(**given))
    num_tokens = [sum(s["tokens"] for s in result["reports"][0].sums.values()) for result in results]
    assert sum(num_tokens) == sum(len(r.response_ids) for r in rollouts[:9])
    assert len(set(num_tokens)) == world_size
    for again in ranks.run(world_size, "train", **given):
        assert_same_state(again, results[0])


EVERYTHING = {
    "algorithm.n_minibatches": 2,
    "algorithm.shuffle_rollout": True,
    "algorithm.kl_beta": 0.3,
    "algorithm.kl_penalty_type": "kl",
    "algorithm.entropy_bonus": 0.05,
    "algorithm.ratio_clip_eps": 0.01,
    "algorithm.sampling_params.temperature": 0.7,
    "actor.optim.clip_grad": 0.05,
}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("model", ["llama", "untied"])
def test_two_minibatches_with_every_term(ranks, model_dirs, make_config, rollouts, advantages, world_size, model):
    """The second update is off-policy: old log-probs, clipping and KL all differ from those of the first."""
    config = make_config(EVERYTHING)
    given = {"model_dir": model_dirs[model], "config": config, "rollouts": rollouts, "advantages": advantages}
    results = ranks.run(world_size, "train", **given)
    expected = reference_update(**given)
    assert_follows_reference(results, expected)
    assert all(norm > 0.05 for norm in expected[2]), "the gradient should be clipped"
    second = {i: s for result in results for i, s in result["reports"][1].sums.items()}
    assert sum(s["clipped"] for s in second.values()) > 0
    assert sum(abs(s["ref_kl"]) for s in second.values()) > 0
    assert sum(s["update_kl"] for s in second.values()) > 0
    assert all({report.lr for report in result["reports"]} == {0.01} for result in results)


def test_ties_stay_tied(ranks, model_dirs, make_config, rollouts, advantages):
    for world_size in (1, 2):
        given = {"config": make_config(), "rollouts": rollouts, "advantages": advantages, "num_steps": 2}
        llama = ranks.run(world_size, "train", model_dir=model_dirs["llama"], **given)[0]
        assert llama["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
        gpt2 = ranks.run(world_size, "train", model_dir=model_dirs["gpt2"], **given)[0]
        assert gpt2["tied"] == {"lm_head.weight": "transformer.wte.weight"}
        assert ranks.run(world_size, "train", model_dir=model_dirs["untied"], **given)[0]["tied"] == {}


def test_ranks_share_the_rows(ranks, model_dirs, make_config, rollouts, advantages):
    results = ranks.run(
        3, "train", model_dir=model_dirs["llama"], config=make_config(), rollouts=rollouts, advantages=advantages
    )
    for name, tensor in results[0]["model"].items():
        pieces = [result["local_rows"][name] for result in results]
        covered = [row for start, count in pieces for row in range(start, start + count)]
        assert covered == list(range(len(tensor))), name
