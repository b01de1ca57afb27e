"""Products by oneDNN: a row's bits depend on nothing beside it, and gradients are those of torch's own layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from rlinf_lite.models import products
from rlinf_lite.rollout import packed_layers
from rlinf_lite.rollout.packed_layers import PackedLayers

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not products.is_available(), reason="torch without oneDNN, or no AVX2"),
]


def random(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def check_rows(outputs: int, inputs: int, *, biased: bool, parts: list[tuple[int, int]], threads: int = 1) -> None:
    """Parts of 300 rows, as (first, number), are compared with the same rows of the product of all, by one thread."""
    x, weight, bias = random((300, inputs), (outputs, inputs), (outputs,), seed=outputs)
    bias = bias if biased else None
    expected, copy = products.product(x, weight, bias), products.packed(weight)
    exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(expected, exact.float(), rtol=1e-4, atol=1e-3)
    torch.set_num_threads(threads)  # one_thread sets it back
    for first, num in parts:
        rows = slice(first, first + num)
        assert torch.equal(products.product(x[rows], weight, bias), expected[rows]), (num, outputs, inputs)
        assert torch.equal(products.product(x[rows].clone(), copy, bias), expected[rows]), (num, outputs, inputs)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(1, 7), (5, 300), (20, 64), (64, 64), (576, 1536), (513, 28), (1536, 576), (4109, 897)]
)
def test_a_row_has_the_same_bits_in_every_product(outputs, inputs, biased, threads):
    parts = [(0, 2), (7, 3), (1, 4), (290, 10), (20, 33), (0, 64), (100, 129), (0, 300)]
    check_rows(outputs, inputs, biased=biased, parts=parts, threads=threads)


@pytest.mark.parametrize("seed", range(4))
def test_a_row_has_the_same_bits_in_products_of_random_sizes(seed):
    draw = np.random.default_rng(seed)
    for _ in range(25):
        outputs, inputs = (int(draw.integers(1, draw.choice([65, 2049]))) for _ in range(2))
        parts = [(int(draw.integers(0, 301 - num)), int(num)) for num in draw.integers(2, 300, 3)]
        check_rows(outputs, inputs, biased=bool(draw.integers(2)), parts=parts)


@pytest.mark.parametrize("shape", [(9,), (2, 300), (1, 5, 2), (0,), ()])
def test_gradients_are_those_of_float64(shape):
    x, weight, bias, grad = random((*shape, 40), (24, 40), (24,), (*shape, 24))
    found = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    expected = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    products.linear(*found).backward(grad)
    functional.linear(*expected).backward(grad.double())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad.float(), rtol=1e-4, atol=1e-4)


def test_only_what_needs_a_gradient_gets_one():
    x, weight = random((8, 40), (24, 40))
    products.linear(x.requires_grad_(), weight, None).sum().backward()
    assert x.grad is not None and weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_to_torch(dtype):
    x, weight = (tensor.to(dtype) for tensor in random((8, 40), (24, 40)))
    assert not products.takes(x, weight)
    assert torch.equal(products.linear(x, weight, None), functional.linear(x, weight))


def test_padding_is_bounded_and_shapes_are_few():
    sizes = range(1, 5000)
    for num in sizes:
        more = products.padded(num) - num
        assert 0 <= more <= 63 and (num + more) % 4 == 0
        assert more < 4 if num < 64 else more * 16 <= num
        assert products.padded(num + more) == num + more
        assert products.padded(products.rounded_down(num)) == products.rounded_down(num) <= max(num, 4)
    assert len({products.padded(num) for num in sizes}) < 150


def test_linear_layers_of_both_kinds_are_replaced(monkeypatch):
    model = nn.Sequential(nn.Linear(12, 20), nn.GELU(), Conv1D(6, 20), nn.LayerNorm(6))
    (x,) = random((5, 12))
    expected, calls, true = model(x), [], products.linear
    monkeypatch.setattr(products, "linear", lambda *given: calls.append(1) or true(*given))
    products.use(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert len(calls) == 2


# -- the engine's copies


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(packed_layers, "_LARGE", 1 << 10)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 8, "vocab_size": 1100}
    config = AutoConfig.for_model("llama", num_hidden_layers=2, num_key_value_heads=2, **sizes)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.fixture
def copied(monkeypatch) -> list[torch.Tensor]:
    """The weights that were copied."""
    found, true = [], products.packed
    monkeypatch.setattr(products, "packed", lambda weight: found.append(weight) or true(weight))
    return found


def test_weights_are_copied_once_per_batch(model, copied):
    layers, mlp, (x,) = PackedLayers(model), model.model.layers[0].mlp, random((8, 32))
    expected = mlp(x)
    assert not copied, "no batch is decoded"
    for _ in range(2):
        with layers:
            for _ in range(3):
                assert torch.equal(mlp(x), expected)
                assert torch.equal(mlp(x.expand(20, 8, 32)), expected.expand(20, 8, 32)), "too many rows"
            assert layers.weight(model.lm_head, 8) is layers.weight(model.lm_head, 8) is not model.lm_head.weight
    assert len(copied) == 2 * 4


def test_a_batch_is_decoded_with_the_weights_of_its_time(model, copied):
    layers, layer, (x,) = PackedLayers(model), model.model.layers[0].mlp.up_proj, random((8, 32))
    with layers:
        before = layer(x)
    layer.weight.data.mul_(2.0)
    with layers:
        assert torch.equal(layer(x), 2.0 * before)
    assert len(copied) == 2


def test_another_engine_with_the_same_model_takes_no_copies_away(model, copied):
    """As that of the self-check, which is there before the first batch."""
    products.use(model)
    layers, layer, (x,) = PackedLayers(model), model.model.layers[0].mlp.up_proj, random((8, 32))
    products.use(model)
    other = PackedLayers(model)
    for number, each in enumerate((layers, other, layers), 1):
        with each:
            layer(x)
        assert len(copied) == number
    layer(x)
    assert len(copied) == 3, "no batch is decoded"


def test_copies_stay_below_the_limit(model, copied, monkeypatch):
    layers, mlp, (x,) = PackedLayers(model), model.model.layers[0].mlp, random((8, 32))
    monkeypatch.setattr(packed_layers, "MAX_BYTES", 2 * mlp.up_proj.weight.nbytes)
    expected = mlp(x)
    with layers:
        assert torch.equal(mlp(x), expected)
    assert len(copied) == 2
