"""The engine's half of the self-check, what follows from all checks, and the command line."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlinf_lite.config.compose import load
from rlinf_lite.models import hf_directory
from rlinf_lite.rollout.builtin import BuiltinEngine
from rlinf_lite.selfcheck import made_up
from rlinf_lite.selfcheck.engine import check_engine
from rlinf_lite.selfcheck.records import EngineCheck, UpdateCheck, result_of
from rlinf_lite.selfcheck.twice import Twice
from rlinf_lite.types import Sampling

SAMPLING = Sampling(do_sample=True, temperature=1.0, top_k=-1, top_p=1.0, repetition_penalty=1.0, max_new_tokens=12)
BATCH = made_up.batch_of(made_up.LARGE["cpu"], 20, SAMPLING, seq_length=48)


@pytest.fixture
def embedded():
    """The model, and an engine over it."""
    path = hf_directory.resolve("embedded:tiny-arithmetic")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), hf_directory.load_tokenizer(path)

    ends = made_up.end_tokens(20)
    return model, BuiltinEngine(model, tokenizer, eos_ids=ends, return_logprobs=True, max_rows=512)


def plant(model, after) -> None:
    """Let ``after`` change what the last norm returns."""
    norm = model.model.norm
    forward = norm.forward
    norm.forward = lambda x: after(forward(x))


def test_an_engine_that_repeats_its_bits(embedded):
    check = check_engine(embedded[1], BATCH)
    assert check.is_checked and check.difference is None
    responses = [response for group in check.groups for response in group.responses]
    assert len(responses) == 48 and all(response.logprobs is not None for response in responses)
    assert len({len(response.token_ids) for response in responses}) > 1, "rows leave at different times"


def test_the_operation_that_differs_is_named(embedded):
    model, engine = embedded
    plant(model, lambda x: x + 1e-3 * torch.rand_like(x))
    difference = check_engine(engine, BATCH).difference
    assert (
        difference is not None
        and "differ when generated again (first in the operation rand_like.default)" in difference
    )


def test_noise_that_is_no_operation(embedded):
    model, engine = embedded
    noise = iter(range(1, 1 << 30))
    plant(model, lambda x: x * (1.0 + 1e-3 * next(noise)))
    difference = check_engine(engine, BATCH).difference
    assert difference is not None and difference.endswith("differ when generated again (no operation alone does)")


def test_an_engine_whose_bits_depend_on_what_is_generated_together(embedded):
    model, engine = embedded
    plant(model, lambda x: x * (1.0 + 1e-3 * x.shape[1]))
    difference = check_engine(engine, BATCH).difference
    assert difference is not None and difference.endswith("of response 0 to prompt 7 differ when generated alone")


def test_random_operations_that_draw_the_same_numbers_again():
    torch.manual_seed(3)
    with Twice(replay=True) as found:
        drawn = torch.nn.functional.dropout(torch.ones(1000), 0.5)
    torch.manual_seed(3)
    assert found.first is None and found.seen.total() > 0
    assert torch.equal(drawn, torch.nn.functional.dropout(torch.ones(1000), 0.5))


def test_the_made_up_batch_fits_the_model_and_the_config():
    lengths = [len(prompt.problem.prompt_ids) for prompt in BATCH.prompts]
    assert lengths == [1, 36, 33, 7, 36, 36, 2, 18] and BATCH.sampling.max_new_tokens == 12
    ids = [token for prompt in BATCH.prompts for token in prompt.problem.prompt_ids]
    assert set(ids) == set(range(20))
    shortest = made_up.batch_of(made_up.SMALL["cpu"], 20, replace(SAMPLING, max_new_tokens=3), seq_length=4)
    assert {len(prompt.problem.prompt_ids) for prompt in shortest.prompts} == {1}
    parts = [[prompt.prompt_index for prompt in part.prompts] for part in made_up.parts_of(BATCH, 3)]
    assert parts == [[7, 6, 5], [4, 3, 2], [1, 0]]


@pytest.fixture
def engine(embedded) -> EngineCheck:
    return check_engine(embedded[1], BATCH)


def logprobs(engine: EngineCheck) -> np.ndarray:
    return np.concatenate([response.logprobs for group in engine.groups for response in group.responses])


def test_the_line_of_a_good_machine(engine):
    found_M = logprobs(engine)
    result = result_of(load([]), [engine, copy.deepcopy(engine)], [UpdateCheck(values_M=found_M)] * 2)
    assert result.is_good
    assert str(result) == f"reproducible: yes; engine and trainer agree: yes ({len(found_M)} tokens compared)"


def test_engine_and_trainer_that_do_not_agree(engine):
    other_M = logprobs(engine)
    other_M[3] -= 0.5
    policy = [UpdateCheck(values_M=other_M)]
    result = result_of(load([]), [engine], policy)
    assert not result.is_good and "agree: no: 1 log-probs differ, by up to 5.0e-01" in str(result)
    expected = result_of(load(["rollout.model.precision=bf16"]), [engine], policy)
    assert expected.is_good and "by up to 5.0e-01, as this config lets expect (" in str(expected)


@pytest.mark.parametrize("setting", ["actor.training_backend=megatron", "actor.fsdp_config.strategy=fsdp"])
def test_megatron_and_fsdp1_are_close_to_the_engine(engine, setting):
    config = load([setting])
    for gap, is_good in ((1e-6, True), (0.5, False)):
        other_M = logprobs(engine)
        other_M[3] -= gap
        result = result_of(config, [engine], [UpdateCheck(values_M=other_M)])
        assert result.is_good == is_good
        assert ("as this config lets expect" in str(result)) == is_good


def test_ranks_are_compared_with_each_other(engine):
    found_M = logprobs(engine)
    one, other = UpdateCheck(values_M=found_M), UpdateCheck(values_M=found_M * 2, difference="x differs")
    group = engine.groups[1]
    changed = replace(group.responses[5], logprobs=group.responses[5].logprobs + 1.0)
    groups = [engine.groups[0], replace(group, responses=(*group.responses[:5], changed)), *engine.groups[2:]]
    result = result_of(load([]), [engine, replace(engine, groups=groups)], [one, other], [one, one])
    assert result.mismatch is None and result.differences == (
        "rollout ranks 0 and 1: the log-probs of response 5 to prompt 1 differ",
        "actor rank 1: x differs",
        "actor ranks 0 and 1: the same forward pass gives other values",
    )


def test_vllm_is_not_checked():
    groups = made_up.made_up_groups(BATCH, 20)
    num_tokens = sum(len(response.token_ids) for group in groups for response in group.responses)
    values_M = np.zeros(num_tokens, dtype=np.float32)
    result = result_of(load([]), [EngineCheck(groups=groups, is_checked=False)], [UpdateCheck(values_M=values_M)])
    assert result.is_good and str(result) == "reproducible: yes (the update; vLLM's generation is not checked)"


COMMAND = "import sys\nfrom rlinf_lite.selfcheck.__main__ import main\n"
LONGER = "'runner.seq_length=48', 'algorithm.sampling_params.max_new_tokens=12'"


@pytest.mark.soak  # every whole run begins with this check
def test_the_command_compares_and_ends_with_0(run_forked):
    shown = run_forked("-c", f"{COMMAND}sys.exit(main(['grpo-tiny-arithmetic', {LONGER}]))")
    assert shown.returncode == 0, shown.stderr
    *rows, last = shown.stdout.splitlines()
    assert last.startswith("reproducible: yes; engine and trainer agree: yes (")
    assert len(rows) == 9 and all(row.endswith("same") for row in rows[2:]), shown.stdout


def test_the_command_names_what_differs_and_ends_with_1(run_forked):
    noise = (
        "import torch\nfrom transformers.models.llama.modeling_llama import LlamaMLP\nforward = LlamaMLP.forward\n"
        "LlamaMLP.forward = lambda self, x: forward(self, x) + 1e-3 * torch.rand_like(x)\n"
    )
    shown = run_forked("-c", f"{COMMAND}{noise}sys.exit(main([{LONGER}]))")
    assert shown.returncode == 1, shown.stderr
    assert "each of " in shown.stdout and "DIFFERENT: rand_like.default (" in shown.stdout
    assert "reproducible: no: rollout rank 0: " in shown.stdout.splitlines()[-1]
    assert "(first in the operation rand_like.default)" in shown.stdout.splitlines()[-1]


def test_the_command_refuses_with_2(run_forked):
    shown = run_forked("-c", f"{COMMAND}sys.exit(main(['cluster.self_chek=false']))")
    assert shown.returncode == 2 and "did you mean cluster.self_check?" in shown.stderr
