"""Tiny models of several architectures, their base directories and checkpoints, and the converters as commands."""

import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from rlinf_lite.checkpoint import Checkpointer
from rlinf_lite.models.hf_directory import resolve
from rlinf_lite.ties import tied_names
from rlinf_lite.weights.names import named_weights

TOOLS = Path(__file__).parents[3] / "toolkits" / "ckpt_convertor"
TO_HF = TOOLS / "convert_dcp_to_hf.py"
TO_DCP = TOOLS / "convert_hf_to_dcp.py"
EMBEDDED = "embedded:tiny-arithmetic"
INPUT_IDS = torch.tensor([[1, 5, 3, 2]])
SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
GPT2_SIZES = {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
CONFIGS = {
    "llama": lambda tied: LlamaConfig(**SIZES, tie_word_embeddings=tied),
    "qwen2": lambda tied: Qwen2Config(**SIZES, tie_word_embeddings=tied),
    "qwen3": lambda tied: Qwen3Config(**SIZES, tie_word_embeddings=tied),
    "gemma": lambda tied: GemmaConfig(**SIZES, tie_word_embeddings=tied),
    "gpt2": lambda tied: GPT2Config(**GPT2_SIZES, tie_word_embeddings=tied),
}


@pytest.fixture
def make_model():
    def make(family="llama", tied=True, seed=0, **changes):
        config = CONFIGS[family](tied)
        config.update(changes)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for param in model.parameters():  # biases and norms too, which begin alike in all models
            torch.nn.init.normal_(param, std=0.1)
        return model

    return make


@pytest.fixture
def base_of(tmp_path):
    """The directory that a model was trained from: the same architecture, other weights, a tokenizer."""

    def save(model, name="base"):
        directory = tmp_path / name
        torch.manual_seed(99)
        AutoModelForCausalLM.from_config(model.config).save_pretrained(directory)
        for file in resolve(EMBEDDED).glob("tokenizer*"):
            shutil.copyfile(file, directory / file.name)
        return directory

    return save


@pytest.fixture
def checkpoint_of(tmp_path):
    """Save a model as the trainer does."""

    def save(model, step=5, **info):
        tensors = dict(named_weights(model))
        moments = {name: {"exp_avg": torch.zeros_like(tensor)} for name, tensor in model.named_parameters()}
        state = {"model": tensors, "optim": moments, "lr_scheduler": {"num_updates": torch.tensor(1)}}
        info = {"tied": tied_names(model), **info}
        return Checkpointer(tmp_path / "checkpoints").save(step, state, info=info).path

    return save


@pytest.fixture
def tool(capsys):
    """``tool(script)(flag=value, ...)``: exit code and output."""

    def load(script):
        main = runpy.run_path(str(script))["main"]

        def run(**flags):
            capsys.readouterr()  # what transformers printed while the test made its models
            code = main([text for flag, value in flags.items() for text in (f"--{flag}", str(value))])
            out, err = capsys.readouterr()
            return code, err if code else out

        return run

    return load


@pytest.fixture
def to_hf(tool):
    return tool(TO_HF)


@pytest.fixture
def to_dcp(tool):
    return tool(TO_DCP)


@pytest.fixture
def assert_refused():
    def check(answer, *texts):
        """One line, exit code 2."""
        code, printed = answer
        assert code == 2
        assert printed.count("\n") == 1
        for text in ("error: ", *texts):
            assert text in printed

    return check


@pytest.fixture
def assert_same_model():
    def check(directory, model, dtype=torch.float32):
        """The directory loads without a warning, and is bitwise identical to ``model`` as ``dtype``."""
        loaded, report = AutoModelForCausalLM.from_pretrained(
            directory, local_files_only=True, output_loading_info=True
        )
        assert not any(report.values()), report
        assert loaded.dtype == dtype
        expected = model.to(dtype) if dtype != torch.float32 else model
        theirs, ours = dict(named_weights(loaded)), dict(named_weights(expected))
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in ours)
        assert tied_names(loaded) == tied_names(model)
        with torch.no_grad():
            assert torch.equal(loaded.eval()(INPUT_IDS).logits, expected(INPUT_IDS).logits)

    return check


@pytest.fixture
def stored():
    def read(directory):
        """All tensors in a directory's safetensors files."""
        return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}

    return read
