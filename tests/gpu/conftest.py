"""Models with the heads of Qwen2.5-0.5B for tests on a GPU, smaller ones for the same tests on a CPU."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from rlinf_lite import numerics
from rlinf_lite.models import hf_directory

SHAPES = {
    "cuda": {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14},
    "cpu": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4},
}


@pytest.fixture
def fixed_kernels(monkeypatch):
    """`numerics.fix` in this process, undone after the test."""
    threads, devices = torch.get_num_threads(), []
    for name in numerics.environment():
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv(numerics.WORKSPACE, numerics.environment()[numerics.WORKSPACE])
    monkeypatch.setattr(numerics, "_mkl_mode_is_ours", False)  # so that it stays: MKL is in it for good

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
