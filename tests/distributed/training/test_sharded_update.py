"""The sharded update against a single process, an unsharded transformers model and ordinary autograd, row by row."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlinf_lite.training.batch import arrange
from rlinf_lite.types import Group
from rlinf_lite.weights.checksum import added, checksums
from rlinf_lite.weights.pieces import join_rows

LONGER_FORM = [pytest.param(num_ranks, marks=pytest.mark.soak) for num_ranks in (1, 3)]
TOLERANCE = {"rtol": 2e-5, "atol": 2e-7}
"""Ranks compute in float32, the single process in float64 with transformers' own attention."""


class Row(NamedTuple):
    """A response with its prompt."""

    prompt_ids: torch.Tensor
    response_ids: torch.Tensor
    logprobs: np.ndarray


def rows_of(groups: list[Group]) -> list[Row]:
    return [
        Row(
            torch.tensor(group.prompt.problem.prompt_ids, dtype=torch.int64),
            torch.from_numpy(response.token_ids),
            response.logprobs,
        )
        for group in groups
        for response in group.responses
    ]


def change(groups: list[Group], rows, **changes) -> list[Group]:
    """``groups`` with the responses ``rows`` (counted over all groups) changed; a change may be a function of it."""
    size = len(groups[0].responses)

    def changed(row, response):
        given = {name: value(response) if callable(value) else value for name, value in changes.items()}
        return replace(response, **given) if row in rows else response

    return [
        replace(group, responses=tuple(changed(g * size + i, response) for i, response in enumerate(group.responses)))
        for g, group in enumerate(groups)
    ]


def row_logits(model, row):
    """Logits [R, V] that predict the response's tokens, from a forward pass of this row alone, unpadded."""
    ids = torch.cat([row.prompt_ids, row.response_ids])
    return model(input_ids=ids[None], use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1]


def row_logprobs(model, row, temperature):
    all_logprobs = (row_logits(model, row) / temperature).log_softmax(-1)
    return all_logprobs[torch.arange(len(row.response_ids)), row.response_ids]


def reference_update(model_dir, config, groups, advantages, left_out=()):
    """One step without the rows that are left out, written out: clipped loss with importance weights, k2 KL, entropy
    bonus, clipping by norm, AdamW.
    """
    algorithm, optim, responses = config.algorithm, config.actor.optim, rows_of(groups)
    temperature = algorithm.sampling_params.temperature
    model, base = (AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64) for _ in range(2))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=optim.lr,
        betas=(optim.adam_beta1, optim.adam_beta2),
        eps=optim.adam_eps,
        weight_decay=optim.weight_decay,
    )
    with torch.no_grad():
        old = [row_logprobs(model, row, temperature) for row in responses]
        ref = [row_logprobs(base, row, temperature) for row in responses]
    norms, losses = [], []
    seed = config.actor.seed if algorithm.shuffle_rollout else None
    for all_rows in arrange(len(responses), 1, num_minibatches=algorithm.n_minibatches, shuffle_seed=seed):
        rows = [row for row in all_rows if row not in left_out]
        if not rows:
            norms.append(0.0)
            losses.append(0.0)
            continue
        num_tokens = sum(len(responses[row].response_ids) for row in rows)
        loss = torch.zeros(())
        for row in rows:
            logprobs = row_logprobs(model, responses[row], temperature)
            ratio = (logprobs - old[row]).exp()
            clipped = ratio.clamp(1 - algorithm.ratio_clip_eps, 1 + algorithm.ratio_clip_eps)
            token_loss = -torch.minimum(ratio * advantages[row], clipped * advantages[row])
            if algorithm.importance_sampling_fix:
                engine = torch.from_numpy(responses[row].logprobs)
                token_loss = token_loss * (old[row] - engine).exp().clamp(max=algorithm.importance_sampling_clip)
            token_loss = token_loss + algorithm.kl_beta * 0.5 * (logprobs - ref[row]).square()
            scaled = row_logits(model, responses[row]) / temperature
            entropy = torch.distributions.Categorical(logits=scaled).entropy()
            token_loss = token_loss - algorithm.entropy_bonus * entropy
            loss = (
                loss
                + {
                    "token-mean": token_loss.sum() / num_tokens,
                    "seq-mean-token-sum": token_loss.sum() / len(rows),
                    "seq-mean-token-mean": token_loss.mean() / len(rows),
                }[algorithm.loss_agg_func]
            )
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
            torch.testing.assert_close(
                result["model"][name].double(), param.detach(), **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
            )
            for key in ("exp_avg", "exp_avg_sq", "step"):
                found, wanted = result["optim"][name][key].double(), moments[name][key].double()
                torch.testing.assert_close(found, wanted, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
        assert [report.grad_norm for report in result["reports"]] == pytest.approx(norms, rel=1e-5)
    for update, loss in enumerate(losses):
        units = [unit for result in results for unit in result["reports"][update].units.items()]
        assert sorted(index for index, _ in units) == list(range(len(units)))
        assert sum(unit.shares["loss/total"] for _, unit in units) == pytest.approx(loss, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("world_size", [2, *LONGER_FORM])
@pytest.mark.parametrize(
    "loss_agg_func", ["token-mean", "seq-mean-token-mean", pytest.param("seq-mean-token-sum", marks=pytest.mark.soak)]
)
def test_equals_one_process(
    ranks, model_dirs, make_config, groups, advantages, assert_same_state, world_size, loss_agg_func
):
    """Ten rows make five units: neither 2 nor 3 ranks split them evenly, so one rank idles at the end."""
    config = make_config({"algorithm.loss_agg_func": loss_agg_func})
    given = {"model_dir": model_dirs["llama"], "config": config, "groups": groups, "advantages": advantages}
    results = ranks.run(world_size, "train", **given)
    assert_follows_reference(results, reference_update(**given))
    # On-policy every ratio is 1, so their sum counts tokens.
    num_tokens = [sum(u.token_sums["policy/ratio"] for u in result["reports"][0].units.values()) for result in results]
    assert sum(num_tokens) == sum(len(row.response_ids) for row in rows_of(groups))
    assert len(set(num_tokens)) == world_size
    for again in ranks.run(world_size, "train", **given):
        assert_same_state(again, results[0])


EVERYTHING = {
    "algorithm.n_minibatches": 2,
    "algorithm.shuffle_rollout": True,
    "algorithm.kl_beta": 0.3,
    "algorithm.kl_penalty_type": "mse",
    "algorithm.entropy_bonus": 0.05,
    "algorithm.ratio_clip_eps": 0.01,
    "algorithm.importance_sampling_fix": True,
    "algorithm.importance_sampling_clip": 1.1,
    "rollout.return_logprobs": True,
    "algorithm.sampling_params.temperature": 0.7,
    "actor.optim.clip_grad": 0.05,
}


@pytest.mark.parametrize("world_size", [2, *LONGER_FORM])
@pytest.mark.parametrize("model", ["llama", "untied"])
def test_two_minibatches_with_every_term(ranks, model_dirs, make_config, groups, advantages, world_size, model):
    """The second update is off-policy: old log-probs, clipping and KL all differ from those of the first."""
    config = make_config(EVERYTHING)
    given = {"model_dir": model_dirs[model], "config": config, "groups": groups, "advantages": advantages}
    results = ranks.run(world_size, "train", **given)
    expected = reference_update(**given)
    assert_follows_reference(results, expected)
    assert all(norm > 0.05 for norm in expected[2]), "the gradient should be clipped"
    second = [unit.token_sums for result in results for unit in result["reports"][1].units.values()]
    for name in ("policy/clip_fraction", "policy/kl", "policy/update_kl"):
        assert sum(sums[name] for sums in second) > 0
    assert all({report.lr for report in result["reports"]} == {0.01} for result in results)


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.soak), 2])
@pytest.mark.parametrize(
    "loss_agg_func", ["token-mean", "seq-mean-token-mean", pytest.param("seq-mean-token-sum", marks=pytest.mark.soak)]
)
def test_rows_left_out_are_in_no_term_and_no_normalizer(
    ranks, model_dirs, make_config, groups, advantages, assert_same_state, world_size, loss_agg_func
):
    """What they hold, finite or not, changes no bit; the others are trained on as though they had been alone."""
    config = make_config(EVERYTHING | {"algorithm.loss_agg_func": loss_agg_func})
    left_out = {0, 4, 7, 8}
    given = {"model_dir": model_dirs["llama"], "config": config, "groups": groups, "left_out": left_out}
    results = ranks.run(world_size, "train", **given, advantages=advantages)
    assert_follows_reference(results, reference_update(**given, advantages=advantages))
    kept = sum(len(row.response_ids) for i, row in enumerate(rows_of(groups)) if i not in left_out)
    assert sum(report.num_tokens for report in results[0]["reports"]) == kept
    broken = change(groups, left_out, logprobs=lambda response: np.full_like(response.logprobs, np.nan))
    nan = advantages.clone()
    nan[sorted(left_out)] = float("nan")
    again = ranks.run(world_size, "train", **{**given, "groups": broken}, advantages=nan)
    for one, other in zip(results, again, strict=True):
        assert_same_state(one, other)
        assert one["reports"] == other["reports"]


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_responses_without_tokens(ranks, model_dirs, make_config, groups, advantages, world_size):
    """A unit of nothing but them has no loss token at all."""
    config = make_config(EVERYTHING | {"algorithm.shuffle_rollout": False})
    left_out = {2, 3, 9}
    empty = np.array([], dtype=np.int64)
    failed = change(groups, left_out, token_ids=empty, loss_mask=empty.astype(bool), logprobs=None)
    given = {"model_dir": model_dirs["llama"], "config": config, "left_out": left_out, "advantages": advantages}
    results = ranks.run(world_size, "train", groups=failed, **given)
    assert_follows_reference(results, reference_update(groups=groups, **given))


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_without_loss_tokens_no_step_is_taken(
    ranks, model_dirs, make_config, groups, advantages, assert_same_state, world_size
):
    """Neither weight decay nor momentum moves the weights; the learning rate still moves."""
    config = make_config({"algorithm.n_minibatches": 2, "actor.optim.lr_scheduler": "linear", "algorithm.kl_beta": 0.1})
    given = {"model_dir": model_dirs["llama"], "config": config, "groups": groups, "advantages": advantages}
    first = {0, 1, 2, 3, 4}
    results = ranks.run(world_size, "train", **given, left_out=first)
    skipped, taken = results[0]["reports"]
    assert (skipped.skipped, skipped.grad_norm, skipped.units, taken.skipped) == (True, 0.0, {}, False)
    assert (results[0]["num_updates"], taken.lr) == (2, pytest.approx(0.01 * 99 / 100))
    assert {int(moments["step"]) for moments in results[0]["optim"].values()} == {1}
    base = AutoModelForCausalLM.from_pretrained(model_dirs["llama"], dtype=torch.float32).state_dict()
    nothing = ranks.run(world_size, "train", **given, left_out=set(range(10)), num_steps=2)
    assert nothing[0]["num_updates"] == 4
    for result in nothing:
        assert all(torch.equal(tensor, base[name]) for name, tensor in result["model"].items())


def test_ties_stay_tied(ranks, model_dirs, make_config, groups, advantages):
    for world_size in (1, 2):
        given = {"config": make_config(), "groups": groups, "advantages": advantages, "num_steps": 2}
        llama = ranks.run(world_size, "train", model_dir=model_dirs["llama"], **given)[0]
        assert llama["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
        gpt2 = ranks.run(world_size, "train", model_dir=model_dirs["gpt2"], **given)[0]
        assert gpt2["tied"] == {"lm_head.weight": "transformer.wte.weight"}
        assert ranks.run(world_size, "train", model_dir=model_dirs["untied"], **given)[0]["tied"] == {}


def test_each_rank_has_its_own_rows(ranks, model_dirs, make_config, groups, advantages):
    results = ranks.run(
        3, "train", model_dir=model_dirs["llama"], config=make_config(), groups=groups, advantages=advantages
    )
    for name, tensor in results[0]["model"].items():
        pieces = [result["local_rows"][name] for result in results]
        covered = [row for start, count in pieces for row in range(start, start + count)]
        assert covered == list(range(len(tensor))), name


@pytest.mark.parametrize("one_group", [False, True])
def test_weights_whole_and_in_rows_are_the_trained_ones(ranks, model_dirs, make_config, groups, advantages, one_group):
    given = {"model_dir": model_dirs["llama"], "config": make_config(), "groups": groups, "advantages": advantages}
    given["one_group"] = one_group
    for dtype in (torch.float32, torch.bfloat16):
        results = ranks.run(2, "published", dtype=dtype, **given)
        trained = results[0]["model"]
        assert [piece.name for piece in results[0]["local"]] == list(trained)
        assert [piece.name for piece in results[1]["whole"]] == list(trained)
        shapes = {name: tuple(tensor.shape) for name, tensor in trained.items()}
        joined = dict(join_rows((piece for result in results for piece in result["local"] if len(piece.rows)), shapes))
        for name, first_row, tensor in results[1]["whole"]:
            assert first_row == 0 and torch.equal(tensor, trained[name].to(dtype))
            assert torch.equal(joined[name], trained[name].to(dtype))
        whole = checksums(results[0]["whole"])
        assert added(checksums(result["local"]) for result in results) == whole and list(whole) == list(trained)


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.soak), 3])
@pytest.mark.parametrize("reference", [False, True])
def test_logprobs_are_those_of_one_process(ranks, model_dirs, make_config, groups, world_size, reference):
    """Five units; without dropout, although the policy is in training mode for its updates."""
    config = make_config(
        {"actor.model.dropout": True, "algorithm.kl_beta": 0.1, "algorithm.sampling_params.temperature": 0.8}
    )
    given = {"model_dir": model_dirs["gpt2"], "config": config, "groups": groups}
    results = ranks.run(world_size, "logprobs", reference=reference, **given)
    assert sorted(index for result in results for index in result["mine"]) == list(range(5))
    model = AutoModelForCausalLM.from_pretrained(given["model_dir"], dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.cat([row_logprobs(model, row, 0.8) for row in rows_of(groups)])
    torch.testing.assert_close(results[-1]["whole"], expected, rtol=0, atol=1e-5)
    assert all(result["training"] and result["has_reference"] for result in results)


def test_no_reference_is_built_without_a_kl_term(ranks, model_dirs, make_config, groups):
    given = {"model_dir": model_dirs["llama"], "config": make_config(), "groups": groups, "reference": False}
    assert not ranks.run(1, "logprobs", **given)[0]["has_reference"]
