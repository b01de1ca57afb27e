"""Any number of ranks is bit-exact: one sha256 of parameters and optimizer state after every step."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

MIXED = "actor.fsdp_config.mixed_precision."
PLAIN = {
    "algorithm.n_minibatches": 2,
    "algorithm.kl_beta": 0.1,
    "algorithm.shuffle_rollout": True,
    "algorithm.training_batch_size_per_gpu": 1,
    "actor.optim.clip_grad": 0.05,
    "actor.optim.adam_eps": 1e-8,
}
"""Two mini-batches of five units, and a gradient that is clipped."""
CASES = {
    "tied": ("llama", {}),
    "untied, activations recomputed": ("untied", {"actor.fsdp_config.gradient_checkpointing": True}),
    "dropout": ("gpt2", {"actor.model.dropout": True}),
    "dropout drawn again": ("gpt2", {"actor.model.dropout": True, "actor.fsdp_config.gradient_checkpointing": True}),
    "bf16 compute, fp32 reduction": ("llama", {f"{MIXED}param_dtype": "bf16", f"{MIXED}reduce_dtype": "fp32"}),
    "bf16 compute and reduction": ("llama", {f"{MIXED}param_dtype": "bf16"}),
    "bf16 parameters, fp32 reduction": ("llama", {"actor.model.precision": "bf16", f"{MIXED}reduce_dtype": "fp32"}),
    "bf16 parameters": ("llama", {"actor.model.precision": "bf16"}),
    "fp16, scaled": (
        "llama",
        {
            f"{MIXED}param_dtype": "fp16",
            "actor.fsdp_config.grad_scaler.enabled": True,
            "actor.fsdp_config.grad_scaler.init_scale": 2.0**19,  # overflows at first
        },
    ),
    "offload": ("llama", {"actor.fsdp_config.cpu_offload": True}),
    "one group": ("llama", {}),
    "one group, bf16 compute": ("llama", {f"{MIXED}param_dtype": "bf16", f"{MIXED}reduce_dtype": "fp32"}),
    "no resharding": ("llama", {"actor.fsdp_config.reshard_after_forward": False}),
    "three slots": ("llama", {"actor.fsdp_config.virtual_ranks": 3}),
    "two slots, bf16 compute": (
        "untied",
        {"actor.fsdp_config.virtual_ranks": 2, f"{MIXED}param_dtype": "bf16", f"{MIXED}reduce_dtype": "fp32"},
    ),
    "one slot, dropout": ("gpt2", {"actor.fsdp_config.virtual_ranks": 1, "actor.model.dropout": True}),
    "fewer units than ranks": ("untied", {"algorithm.training_batch_size_per_gpu": 3}),
}
SAME = {
    "offload": "tied",
    "one group": "tied",
    "one group, bf16 compute": "bf16 compute, fp32 reduction",
    "no resharding": "tied",
    "dropout drawn again": "dropout",
    "one slot, dropout": "dropout",
    "bf16 parameters": "bf16 parameters, fp32 reduction",
}
"""Cases that must end as others do: units are added one by one in a single slot, too, and every sum is in float32."""
STEPS = 2


@pytest.fixture
def given(model_dirs, make_config, groups, advantages):
    def make(cases):
        return {
            "cases": {name: (model_dirs[model], make_config({**PLAIN, **changes})) for name, (model, changes) in cases},
            "groups": groups,
            "advantages": advantages,
        }

    return make


QUICK = {
    "tied": (1, 2, 3, 4),
    "one group": (1, 2, 3, 4),
    "one group, bf16 compute": (1, 2),
    "fewer units than ranks": (1, 4),
    "dropout": (1, 2),
    "bf16 compute, fp32 reduction": (1, 2),
    "fp16, scaled": (1, 2),
}


@pytest.mark.parametrize(
    "sizes_of", [QUICK, pytest.param(dict.fromkeys(CASES, (1, 2, 3, 4)), marks=pytest.mark.soak)], ids=["quick", "all"]
)
def test_one_to_four_ranks(ranks, given, sizes_of):
    found = {}
    for size in (1, 2, 3, 4):
        cases = given([(name, CASES[name]) for name, sizes in sizes_of.items() if size in sizes])
        found[size] = ranks.run(size, "digests", **cases, num_steps=STEPS)[0]
    for name, sizes in sizes_of.items():
        of_sizes = [found[size][name] for size in sizes]
        assert len(of_sizes[0]) == STEPS and len({digest for digest, _ in of_sizes[0]}) == STEPS, name
        assert all(repr(one) == repr(of_sizes[0]) for one in of_sizes), name  # the norm of an overflow is NaN
    last = {name: found[1][name][-1] for name in sizes_of}
    assert all(min(norms) > 0.05 for name, (_, norms) in last.items() if "fp16" not in name), "nothing is clipped"
    digests = {name: digest for name, (digest, _) in last.items()}
    for name, as_in in SAME.items():
        assert digests.pop(name, None) in (None, digests.get(as_in)), name
    assert len(set(digests.values())) == len(digests), "two cases are the same"


SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


@pytest.mark.soak
@pytest.mark.parametrize("param_dtype", ["fp32", "bf16"])
def test_the_shape_of_smollm2(ranks, make_config, groups, advantages, tmp_path, param_dtype):
    """135M parameters with random weights: 2 ranks against 1, two steps of four units."""
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMOLLM2_135M)).save_pretrained(tmp_path)
    config = make_config(
        {
            "algorithm.training_batch_size_per_gpu": 3,
            "actor.optim.clip_grad": 0.05,
            f"{MIXED}param_dtype": param_dtype,
            f"{MIXED}reduce_dtype": "fp32",
        }
    )
    given = {"cases": {"smollm2": (str(tmp_path), config)}, "groups": groups, "advantages": advantages, "num_steps": 2}
    one, two = (ranks.run(size, "digests", **given)[0]["smollm2"] for size in (1, 2))
    assert one == two and len({digest for digest, _ in one}) == 2


@pytest.mark.soak  # shorter: the ranks of a whole run change in tests/e2e/test_algorithms.py
@pytest.mark.parametrize("case", ["dropout", "three slots"])
def test_ranks_that_come_and_go(ranks, given, tmp_path, case):
    """4, then 2, 3 and 1 ranks, each from the checkpoint of those before."""
    straight = ranks.run(1, "digests", **given([(case, CASES[case])]), num_steps=4)[0][case]
    ((model_dir, config),) = given([(case, CASES[case])])["cases"].values()
    rest = {name: value for name, value in given([]).items() if name != "cases"}
    path, digests = None, []
    for number, size in enumerate((4, 2, 3, 1), 1):
        result = ranks.run(
            size,
            "train_and_save",
            model_dir=model_dir,
            config=config,
            root=str(tmp_path / str(number)),
            steps=range(number, number + 1),
            save_after=number,
            load=path,
            **rest,
        )[0]
        path = result["path"]
        digests.append((result["digest"], [report.grad_norm for report in result["reports"]]))
    assert digests == straight


@pytest.mark.parametrize("virtual_ranks", [5040, pytest.param(2, marks=pytest.mark.soak)])
def test_an_abandoned_step_leaves_nothing_behind(
    ranks, model_dirs, make_config, groups, advantages, assert_same_state, virtual_ranks
):
    """On every rank the loss fails in the middle of a mini-batch, when gradients have been reduced, or not yet."""
    config = make_config(
        {**PLAIN, "algorithm.n_minibatches": 1, "actor.fsdp_config.virtual_ranks": virtual_ranks, "actor.seed": 3}
    )
    given = {"model_dir": model_dirs["llama"], "config": config, "groups": groups, "advantages": advantages}
    for size in (1, 2):
        plain, abandoned = ranks.run(size, "train_after_an_abandoned_step", **given, fails_at=4)[0]
        assert_same_state(plain, abandoned)


def test_the_norm_is_exact_however_elements_are_spread(ranks):
    """Against integers; tiny and huge elements, an empty shard, zeros, and what is not finite on one rank."""
    found = {size: ranks.run(size, "norms") for size in (1, 2, 3)}
    assert all(repr(norms) == repr(found[1][0]) for of_ranks in found.values() for norms in of_ranks)
    norms = found[1][0]
    assert norms["plain"] == norms["expected"]
    assert norms["tiny"] == pytest.approx(norms["plain"] * 2.0**-120, rel=1e-12)
    assert norms["huge"] == pytest.approx(1e30, rel=1e-6)
    assert norms["bf16"] == norms["bf16 expected"]
    assert (norms["zeros"], repr(norms["nan"]), repr(norms["inf"])) == (0.0, "nan", "inf")
