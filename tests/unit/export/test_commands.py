"""The converters as commands: help, invalid arguments, and peak memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
)

from rlinf_lite import numerics
from rlinf_lite.checkpoint import Checkpointer
from rlinf_lite.models.build import build_on_meta
from rlinf_lite.weights.names import weight_shapes

TOOLS = Path(__file__).parents[3] / "toolkits" / "ckpt_convertor"
TO_HF = TOOLS / "convert_dcp_to_hf.py"
TO_DCP = TOOLS / "convert_hf_to_dcp.py"
SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
MEASURED = """
import runpy, sys
script, *sys.argv[1:] = sys.argv[1:]
code = runpy.run_path(script)["main"]()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print("peak", int(status["VmHWM"].split()[0]) * 1024)  # ru_maxrss would count the process that started this one too
sys.exit(code)
"""

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"dcp_path": "nosuch://x", "output_path": "out"}, "nosuch://x: "),
        ({"dcp_path": "x", "output_path": "out", "max_shard_size": "2 parsecs"}, "is not a size; write it as 2GB"),
        ({"dcp_path": "x", "output_path": "out", "dtype": "fp8"}, "fp32"),
    ],
)
def test_arguments_that_cannot_be_read(flags, text, to_hf, capsys):
    with pytest.raises(SystemExit) as caught:
        to_hf(**flags)
    assert caught.value.code == 2
    assert text in capsys.readouterr().err


def test_help_as_a_command(run_forked):
    for done in (run_forked(TO_HF, "-h"), run_forked(TO_DCP, "-h")):
        assert done.returncode == 0
        assert "example:" in done.stdout
        assert "--output_path" in done.stdout


def peak_bytes(script, **flags):
    """The most memory that a conversion in a process of its own had."""
    given = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
    # The tests have the workers' variables, with which malloc keeps freed memory: a user's shell has not.
    environment = {name: value for name, value in os.environ.items() if name not in numerics.environment()}
    command = [sys.executable, "-c", MEASURED, script, *given]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("peak")[1])


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_model_is_never_whole_in_memory(make_model, base_of, checkpoint_of, stored, tmp_path):
    """Compared with the conversion of a tiny model: a few tensors more, of 8 MB at most."""
    config = LlamaConfig(**{**SIZES, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 16})
    config.save_pretrained(tmp_path / "large")
    shapes = weight_shapes(build_on_meta(config, "fp32"))
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    size = sum(tensor.nbytes for tensor in weights.values())
    assert size > 350e6
    large = Checkpointer(tmp_path).save(1, {"model": weights}, info={"model_path": str(tmp_path / "large")}).path
    small = checkpoint_of(make_model(), model_path=str(base_of(make_model())))

    def peak_of_export(path, name):
        return peak_bytes(TO_HF, dcp_path=path, output_path=tmp_path / name, max_shard_size="50MB")

    def peak_of_import(name):
        return peak_bytes(TO_DCP, hf_path=tmp_path / name, output_path=tmp_path / f"{name} weights")

    grown = peak_of_export(large, "large hf") - peak_of_export(small, "small hf")
    assert grown < size / 4
    assert len(list((tmp_path / "large hf").glob("*.safetensors"))) >= size // 50e6
    assert all(torch.equal(tensor, weights[name]) for name, tensor in stored(tmp_path / "large hf").items())
    grown = peak_of_import("large hf") - peak_of_import("small hf")
    assert grown < size / 4
