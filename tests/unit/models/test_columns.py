"""Products by columns: the bits of the product at once, and the layers that an engine computes so."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from rlinf_lite.models import columns
from rlinf_lite.rollout import wide_layers
from rlinf_lite.rollout.wide_layers import WideLayers

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("num", [4, 5, 16, 129, 300])
@pytest.mark.parametrize(("outputs", "inputs"), [(20, 64), (512, 64), (513, 28), (1536, 576), (4109, 896)])
def test_product_is_that_of_all_columns(outputs, inputs, num, biased):
    random = torch.Generator().manual_seed(outputs + num)
    x, weight, bias = (
        torch.randn(*shape, generator=random) for shape in ((num, inputs), (outputs, inputs), (outputs,))
    )
    bias = bias if biased else None
    assert torch.equal(columns.product(x, weight, bias), functional.linear(x, weight, bias))


@pytest.fixture
def model():
    sizes = {"hidden_size": 32, "intermediate_size": 1056, "num_attention_heads": 4, "head_dim": 8, "vocab_size": 1100}
    config = AutoConfig.for_model("llama", num_hidden_layers=2, num_key_value_heads=2, **sizes)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def calls_of(model, monkeypatch, num: int) -> int:
    """Products by columns in a forward pass of the first layer's MLP over ``num`` tokens, whose result is checked."""
    mlp, calls, x = model.model.layers[0].mlp, [], torch.randn(1, num, 32)
    expected = mlp.down_proj(
        mlp.act_fn(functional.linear(x, mlp.gate_proj.weight)) * functional.linear(x, mlp.up_proj.weight)
    )
    true = columns.product
    with monkeypatch.context() as patch:
        patch.setattr(wide_layers, "product", lambda *given: calls.append(1) or true(*given))
        assert torch.equal(mlp(x), expected)
    return len(calls)


def test_wide_layers_are_computed_by_columns_if_rows_are_few(model, monkeypatch):
    layers = WideLayers(model)
    assert calls_of(model, monkeypatch, 8) == 0, "nothing is known of the weights yet"
    layers.check()
    assert calls_of(model, monkeypatch, 8) == 2  # the layer down has 32 outputs
    assert calls_of(model, monkeypatch, 257) == 0


def test_a_layer_that_would_round_differently_is_computed_at_once(model, monkeypatch):
    layers = WideLayers(model)
    with monkeypatch.context() as patch:
        patch.setattr(wide_layers, "product", lambda *given: torch.nextafter(columns.product(*given), torch.ones(())))
        layers.check()
    assert calls_of(model, monkeypatch, 8) == 0
