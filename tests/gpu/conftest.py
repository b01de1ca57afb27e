"""Models with the heads of Qwen2.5-0.5B for tests on a GPU, smaller ones for the same tests on a CPU; and `Twice`."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from rlinf_lite import numerics
from rlinf_lite.models import hf_directory

SHAPES = {
    "cuda": {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14},
    "cpu": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4},
}
NOT_COMPARED = ("empty", "new_empty", "_local_scalar", "detach", "alias", "view", "_unsafe_view", "expand", "slice")
"""Operations whose outputs are uninitialized, or that only make views."""


class Twice(TorchDispatchMode):
    """Runs every operation twice, the second time with outputs full of NaN, and counts those whose results differ."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.differ: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = str(func).removeprefix("aten."), kwargs or {}
        if name.startswith(NOT_COMPARED):
            return func(*args, **kwargs)
        again = (args, kwargs)
        if func._schema.is_mutable:
            again = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, again)
        out = func(*args, **kwargs)
        first = _tensors(out)
        poison = [torch.full_like(x, float("nan") if x.is_floating_point() else 1) for x in first]
        del poison  # the allocator gives these blocks to the second call
        second = _tensors(func(*again[0], **again[1]))
        self.seen[name] += 1
        # Behind the output of an attention's forward pass are seeds and offsets, which nothing uses without dropout.
        compared = 1 if "attention" in name and "backward" not in name else None
        pairs = list(zip(first, second, strict=True))[:compared]
        self.differ[name] += not all(_equal(one, other) for one, other in pairs)
        return out


def _tensors(out) -> list[Tensor]:
    return [x for x in tree_leaves(out) if isinstance(x, Tensor)]


def _equal(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.fixture
def twice() -> type[Twice]:
    return Twice


@pytest.fixture
def fixed_kernels(monkeypatch):
    """`numerics.fix` in this process, undone after the test."""
    threads, devices = torch.get_num_threads(), []
    for name in numerics.environment():
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv(numerics.WORKSPACE, numerics.environment()[numerics.WORKSPACE])

    def fix(device: str) -> torch.device:
        devices.append(device)
        return numerics.fix(device)

    yield fix
    for device in devices:
        numerics.hand_over(device)
    torch.set_num_threads(threads)


@pytest.fixture
def qwen(tmp_path: Path) -> Callable[[str, int], Path]:
    """Makes a directory of random bf16 weights for a device, with the embedded model's tokenizer."""

    def make(device: str, num_layers: int) -> Path:
        embedded, out = hf_directory.resolve("embedded:tiny-arithmetic"), tmp_path / f"qwen-{device}-{num_layers}"
        ids = AutoConfig.from_pretrained(embedded)
        config = Qwen2Config(
            **SHAPES[device],
            num_hidden_layers=num_layers,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            max_position_embeddings=256,
            bos_token_id=ids.bos_token_id,
            eos_token_id=ids.eos_token_id,
            pad_token_id=ids.pad_token_id,
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(out)
        for file in embedded.iterdir():
            if file.name.startswith(("tokenizer", "special")):
                shutil.copy(file, out)
        return out

    return make
