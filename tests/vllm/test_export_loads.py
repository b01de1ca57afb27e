"""vLLM loads what convert_dcp_to_hf.py writes, weights and tokenizer, and gives the same tokens as transformers."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlinf_lite.checkpoint import Checkpointer
from rlinf_lite.models import hf_directory
from rlinf_lite.ties import tied_names
from rlinf_lite.weights.names import named_weights

pytest.importorskip("vllm")

TOOLS = Path(__file__).parents[2] / "toolkits" / "ckpt_convertor"
BASE = "embedded:tiny-arithmetic-2heads"
SUMS = ["57+38=", "12+30=", "99+99=", "10+11="]
PROGRAM = """
import json, sys
import torch
from rlinf_lite.config import RolloutConfig
from rlinf_lite.rollout import vllm_setup
vllm_setup.prepare_environment(RolloutConfig(), torch.device("cpu"))
import vllm
llm = vllm.LLM(model=sys.argv[1], dtype="float32", max_model_len=32, kv_cache_memory_bytes=1 << 24, enforce_eager=True)
answers = llm.generate(json.loads(sys.argv[2]), vllm.SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False)
print(json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))
"""


@pytest.fixture
def exported(tmp_path):
    """A checkpoint of the embedded model with other weights, as a directory."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(hf_directory.resolve(BASE))
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.01)
    info = {"tied": tied_names(model), "model_path": BASE}
    path = Checkpointer(tmp_path).save(1, {"model": dict(named_weights(model))}, info=info).path
    main = runpy.run_path(str(TOOLS / "convert_dcp_to_hf.py"))["main"]
    assert main(["--dcp_path", str(path), "--output_path", str(tmp_path / "exported")]) == 0
    return tmp_path / "exported"


@pytest.mark.timeout(600)
def test_vllm_loads_the_export(exported):
    command = [sys.executable, "-c", PROGRAM, str(exported), json.dumps(SUMS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported).eval(), hf_directory.load_tokenizer(exported)
    expected = []
    for text in SUMS:
        ids = tokenizer(text, return_tensors="pt")
        out = model.generate(**ids, do_sample=False, max_new_tokens=4)
        expected.append(out[0, ids["input_ids"].shape[1] :].tolist())
    assert json.loads(done.stdout.splitlines()[-1]) == expected
