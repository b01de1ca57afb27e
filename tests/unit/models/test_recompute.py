"""What is cheap is computed again in the backward pass: less memory, and no bit changes."""

from __future__ import annotations

import copy

import pytest
import torch

from rlinf_lite.models import shard
from rlinf_lite.models.recompute import recompute_cheap

IDS = torch.arange(24).reshape(1, 24) % 61


def with_it(model):
    model = copy.deepcopy(model)
    recompute_cheap(shard.blocks(model))
    return model


def passes(model, number=1):
    """Logits and gradients of several passes."""
    found = []
    for _ in range(number):
        logits = model(input_ids=IDS, use_cache=False).logits
        model.zero_grad()
        logits.float().pow(2).mean().backward()
        found += [logits.detach(), *(param.grad.clone() for param in model.parameters())]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2", "qwen3", "gemma2"])
def test_the_same_bits(tiny_model, model_type, dtype):
    model = tiny_model(model_type).to(dtype)
    for one, other in zip(passes(model, 2), passes(with_it(model), 2), strict=True):
        assert torch.equal(one, other)


def test_half_of_a_llama_is_not_kept(tiny_model, live_bytes):
    """Of each token and layer: two outputs of norms, what they multiply with their weights, and two of the MLP."""
    model, kept = tiny_model("llama"), []
    for each in (model, with_it(model)):
        with live_bytes() as live:
            logits = each(input_ids=IDS, use_cache=False).logits
            kept.append(live.now)
        del logits
    config, num_tokens = model.config, IDS.numel()
    dropped = 4 * config.hidden_size + 2 * config.intermediate_size
    assert kept[0] - kept[1] == 4 * num_tokens * config.num_hidden_layers * dropped


def test_nothing_is_held_after_the_backward_pass(tiny_model, live_bytes):
    model = with_it(tiny_model("qwen3"))
    passes(model)
    with live_bytes() as live:
        model(input_ids=IDS, use_cache=False).logits.sum().backward()
        model.zero_grad()
        assert live.now == 0


def test_nothing_is_held_after_a_forward_pass_alone(tiny_model, live_bytes):
    """A step may be abandoned. Nor does a pass that ends with an error hold anything."""
    model = with_it(tiny_model("qwen3"))
    passes(model)
    with live_bytes() as live:
        model(input_ids=IDS, use_cache=False)
        assert live.now == 0
        model.model.norm.forward = None
        with pytest.raises(TypeError):
            model(input_ids=IDS, use_cache=False)
        assert live.now == 0


def test_a_pass_may_be_differentiated_twice(tiny_model):
    gradients = []
    for model in (tiny_model("llama"), with_it(tiny_model("llama"))):
        loss = model(input_ids=IDS, use_cache=False).logits.pow(2).mean()
        loss.backward(retain_graph=True)
        loss.backward()
        gradients.append([param.grad for param in model.parameters()])
        model.zero_grad()
    assert all(map(torch.equal, *gradients))


def test_without_gradients_nothing_changes(tiny_model):
    model = tiny_model("llama")
    with torch.no_grad():
        assert torch.equal(*(each(input_ids=IDS, use_cache=False).logits for each in (model, with_it(model))))


def test_a_tensor_that_was_changed_in_place_is_kept(tiny_model):
    """What was dropped had another value."""

    class Changing(torch.nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, hidden):
            return self.norm(hidden).mul_(2.0).pow(3)

    block = Changing(copy.deepcopy(tiny_model("llama").model.norm))
    gradients = []
    for again in (False, True):
        if again:
            recompute_cheap([block])
        hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        block(hidden).sum().backward()
        gradients.append(hidden.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_needed_tensor_that_was_changed_in_place_is_an_error(tiny_model, dtype):
    """The input of a norm, of which all else is computed again."""

    class Changing(torch.nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, hidden):
            hidden = hidden * 2
            output = self.norm(hidden)
            hidden += 1
            return output

    block = Changing(copy.deepcopy(tiny_model("llama").model.norm)).to(dtype)
    recompute_cheap([block])
    with pytest.raises(RuntimeError, match="changed by an operation in place"):
        block(torch.ones(5, 32, dtype=dtype, requires_grad=True)).sum().backward()


def test_other_code_than_llamas_is_left_alone(tiny_model):
    class Other(type(tiny_model("llama").model.norm)):
        def forward(self, hidden_states):
            return super().forward(hidden_states) + 1

    block = torch.nn.Sequential(Other(8))
    recompute_cheap([block])
    assert "forward" in vars(block) and "forward" not in vars(block[0])
