"""The Triton kernels give the bits of numpy and torch. With TRITON_INTERPRET=1 this runs without a GPU, too."""

from __future__ import annotations

import copy
import os

import numpy as np
import pytest
import torch
from torch.nn import functional

from rlinf_lite import numerics
from rlinf_lite.rollout import gumbel

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="no CUDA device, and not interpreted"),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
KEYS = np.random.default_rng(0).integers(0, 1 << 64, 300, dtype=np.uint64)


@pytest.mark.parametrize(("rows", "vocabulary"), [(4, 5000), (6, 20), (128, 151_936)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_sampler_draws_the_tokens_of_numpy(rows, vocabulary, dtype):
    if INTERPRETED and rows > 6:
        pytest.skip("slow")
    from rlinf_lite.rollout import gumbel_kernel

    generator = torch.Generator().manual_seed(rows)
    logits = (3 * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    logits[:, ::7] = -torch.inf
    keys, words = KEYS[:rows], gumbel.key_words(KEYS[:rows]).to(DEVICE)
    for t in range(8):
        steps = torch.full((rows,), t, dtype=torch.int32, device=DEVICE)
        temperature = torch.tensor([0.7], dtype=torch.float64, device=DEVICE)
        drawn, score = gumbel_kernel.draw(logits.to(DEVICE), temperature, words, steps)
        assert np.array_equal(drawn.cpu().numpy(), gumbel.draw(logits, 0.7, keys, t).numpy())
        assert score.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, "all masked"])
def test_the_sampler_says_which_row_has_no_token(bad):
    from rlinf_lite.rollout import gumbel_kernel

    logits = torch.zeros(3, 9000, device=DEVICE)
    if bad == "all masked":
        logits[1] = -torch.inf
    else:
        logits[1, 8999] = bad
    temperature = torch.tensor([1.0], dtype=torch.float64, device=DEVICE)
    steps = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    _, score = gumbel_kernel.draw(logits, temperature, gumbel.key_words(KEYS[:3]).to(DEVICE), steps)
    assert score.isfinite().tolist() == [True, False, True]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter computes in float32 throughout")
@pytest.mark.parametrize(("outputs", "inputs", "bias"), [(896, 4864, False), (1536, 8960, True), (128, 896, True)])
def test_products_have_the_bits_of_cublaslt(outputs, inputs, bias):
    from rlinf_lite.rollout import few_rows

    numerics.fix("cuda")
    made = torch.Generator("cuda").manual_seed(outputs)
    weight = (torch.randn(outputs, inputs, generator=made, device="cuda") / inputs**0.5).bfloat16()
    added = torch.randn(outputs, generator=made, device="cuda").bfloat16() if bias else None
    for rows in (16, 33, 128, 512):
        x = torch.randn(rows, inputs, generator=made, device="cuda").bfloat16()
        for tiles in few_rows._TILES:
            assert torch.equal(few_rows.product(x, weight, added, tiles), functional.linear(x, weight, added))


@pytest.mark.skipif(INTERPRETED, reason="it is not timed")
def test_a_layer_keeps_its_bits_whatever_is_chosen_for_it():
    """Also where cuBLASLt sums in another order than the kernel."""
    from rlinf_lite.rollout.few_rows import FewRows

    numerics.fix("cuda")
    torch.manual_seed(0)
    model = torch.nn.ModuleList(torch.nn.Linear(k, n, dtype=torch.bfloat16) for n, k in [(100, 1000), (896, 4864)])
    model.to("cuda").requires_grad_(False)
    plain = copy.deepcopy(model)
    few = FewRows(model)
    for rows in (16, 128):
        few.prepare(rows)
        for layer, other in zip(model, plain, strict=True):
            x = torch.randn(1, rows, layer.in_features, device="cuda").bfloat16()
            assert torch.equal(layer(x), other(x))
