"""Equal responses to a prompt are computed once: the log-probs are those of rows alone, the gradient is their sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlinf_lite.models.scored import ScoredModel
from rlinf_lite.models.segments import FlatTokens
from rlinf_lite.training.batch import SplitSettings, StepBatch, StepRows
from rlinf_lite.types import Column, Group, Problem, Prompt, Response

pytestmark = pytest.mark.usefixtures("one_thread")

random = np.random.default_rng(0)
TEXTS = [random.integers(3, 64, size) for size in (1, 5, 40)]
PROMPTS = [random.integers(3, 64, size) for size in (4, 37)]
DRAWN = (1, 0, 1, 2, 1, 0, 2, 2)
"""Of `TEXTS`, by each prompt's responses."""


def group(prompt: np.ndarray) -> Group:
    problem = Problem(problem_id=0, prompt="", answer="", prompt_ids=tuple(prompt.tolist()), source="made")
    responses = tuple(
        Response(
            sample_index=index,
            token_ids=TEXTS[drawn].copy(),
            loss_mask=np.ones(len(TEXTS[drawn]), dtype=np.bool_),
            logprobs=None,
            finished=True,
            text="",
            weights_step=0,
        )
        for index, drawn in enumerate(DRAWN)
    )
    return Group(prompt=Prompt(prompt_index=0, epoch=0, problem=problem), responses=responses)


@pytest.fixture
def root() -> ScoredModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "head_dim": 16, "vocab_size": 64}
    config = AutoConfig.for_model("llama", num_hidden_layers=2, num_key_value_heads=1, initializer_range=0.2, **sizes)
    return ScoredModel(AutoModelForCausalLM.from_config(config).eval())


def trained(root: ScoredModel, rows: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Log-probs, the gradient of their weighted sum, and the tokens computed, in units of so many responses."""
    groups, settings = (
        [group(prompt) for prompt in PROMPTS],
        SplitSettings(num_minibatches=1, shuffle_seed=None, rows_for_forward=1, rows_for_update=rows, max_tokens=None),
    )
    batch = StepBatch(StepRows(groups, step=1, settings=settings), [True] * 16)
    weights = torch.linspace(-1, 1, int(batch.num_tokens_N.sum()))
    (mini,) = batch.for_update({Column.ADVANTAGE: weights}, np.ones(16, dtype=np.bool_))
    root.zero_grad()
    found, num_tokens = [], 0
    for unit in mini.units:
        tokens = FlatTokens.of(unit.ids_N, unit.positions_N, unit.segments)
        given = tokens.ids_N, tokens.positions_N, tokens.layout, unit.source_M, unit.targets_M
        logprob_M = root(*given, 0.7, False)[0]
        (logprob_M * unit.columns[Column.ADVANTAGE]).sum().backward()
        found.append(logprob_M.detach())
        num_tokens += len(unit.ids_N)
    return torch.cat(found), torch.cat([p.grad.flatten() for p in root.parameters()]), num_tokens


def test_log_probs_and_gradient_are_those_of_rows_alone(root):
    (together, gradient, num_tokens), (alone, of_rows, _) = trained(root, 16), trained(root, 1)
    again = trained(root, 16)
    assert num_tokens == sum(map(len, PROMPTS)) + 2 * sum(map(len, TEXTS))
    assert torch.equal(together, alone) and together.std() > 0.1
    assert torch.equal(gradient, again[1])
    assert (gradient.double() - of_rows.double()).norm() <= 1e-6 * of_rows.double().norm()
