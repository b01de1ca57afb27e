"""Hugging Face directories to checkpoints of step 0: bitwise identical models, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
)

from rlinf_lite.checkpoint import Checkpointer
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.formats.read_state import read_tensors, tensor_names
from rlinf_lite.models.build import build_on_meta
from rlinf_lite.models.hf_directory import resolve
from rlinf_lite.weights.names import named_weights

EMBEDDED = "embedded:tiny-arithmetic"
INPUT_IDS = torch.tensor([[1, 5, 3, 2]])

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize("given", ["weights", "weights/global_step_0"])
def test_what_a_checkpoint_of_weights_holds(given, to_dcp, tmp_path):
    code, printed = to_dcp(hf_path=EMBEDDED, output_path=tmp_path / given, dtype="bf16")
    path = tmp_path / "weights" / "global_step_0"
    assert code == 0, printed
    assert str(path) in printed
    manifest = manifests.read_verified(path, "full")
    assert (manifest.step, manifest.world_size) == (0, 1)
    assert manifest.info["model_path"] == EMBEDDED
    assert manifest.info["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    model = build_on_meta(AutoConfig.from_pretrained(resolve(EMBEDDED)), "fp32")
    names = [name for name in tensor_names(path / "actor") if not name.startswith("rng.")]
    assert names == sorted(f"model.{name}" for name, _ in named_weights(model))
    original = load_file(resolve(EMBEDDED) / "model.safetensors")
    held = read_tensors(path / "actor", lambda name: name.startswith("model."))
    assert all(torch.equal(held[f"model.{name}"], tensor.bfloat16()) for name, tensor in original.items())


def test_weights_are_loaded_as_a_model_only(make_model, to_dcp, tmp_path):
    model, other = make_model("qwen3", seed=1), make_model("qwen3", seed=2)
    model.save_pretrained(tmp_path / "hf")
    assert to_dcp(hf_path=tmp_path / "hf", output_path=tmp_path)[0] == 0
    state = {"model": {name: tensor.detach() for name, tensor in named_weights(other)}}
    Checkpointer(tmp_path / "new").load(tmp_path / "global_step_0", state, whole=False)
    with torch.no_grad():
        assert torch.equal(other(INPUT_IDS).logits, model(INPUT_IDS).logits)


def test_names_of_a_bare_base_model_and_of_a_tie(make_model, to_dcp, tmp_path):
    """GPT-2's own file has no ``transformer.``; some directories keep a tied tensor as ``lm_head.weight``."""
    model = make_model("gpt2")
    model.config.save_pretrained(tmp_path / "hf")
    tensors = {name.removeprefix("transformer."): tensor.detach() for name, tensor in named_weights(model)}
    tensors["lm_head.weight"] = tensors.pop("wte.weight")
    save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}, tmp_path / "hf" / "model.safetensors")
    code, printed = to_dcp(hf_path=tmp_path / "hf", output_path=tmp_path)
    assert code == 0, printed
    assert "note: not in the model, so not written: h.0.attn.bias" in printed
    held = read_tensors(tmp_path / "global_step_0" / "actor", lambda name: name.startswith("model."))
    assert held.keys() == {f"model.{name}" for name, _ in named_weights(model)}
    assert all(torch.equal(held[f"model.{name}"], tensor) for name, tensor in named_weights(model))


def test_invalid_model_directories_are_refused(make_model, to_dcp, assert_refused, tmp_path):
    assert_refused(to_dcp(hf_path=tmp_path / "nowhere", output_path=tmp_path / "out"), "--hf_path=", "nowhere")
    make_model().config.save_pretrained(tmp_path / "hf")
    flags = {"hf_path": tmp_path / "hf", "output_path": tmp_path / "out"}
    file = tmp_path / "hf" / "model.safetensors"
    assert_refused(to_dcp(**flags), "no *.safetensors there")
    file.write_bytes(b"no header")
    assert_refused(to_dcp(**flags), "model.safetensors", "copy the directory again")
    tensors = {name: tensor.detach().clone() for name, tensor in named_weights(make_model())}
    save_file({name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}, file)
    assert_refused(to_dcp(**flags), "its weights lack model.norm.weight")
    save_file({**tensors, "model.norm.weight": torch.ones(3)}, file)
    assert_refused(to_dcp(**flags), "model.norm.weight is [3]", "wants [16]")
    save_file({**tensors, "lm_head.weight": torch.ones(20, 16)}, file)
    assert_refused(to_dcp(**flags), "lm_head.weight differs from model.embed_tokens.weight")
    save_file({**tensors, "model.norm.weight": torch.ones(16, dtype=torch.float8_e4m3fn)}, file)
    assert_refused(to_dcp(**flags), "model.norm.weight", "F8_E4M3 is not supported")
    assert not (tmp_path / "out").exists()


def test_outputs_that_are_refused(to_dcp, assert_refused, tmp_path):
    assert_refused(to_dcp(hf_path=EMBEDDED, output_path=tmp_path / "global_step_7"), "global_step_7", "global_step_0")
    assert to_dcp(hf_path=EMBEDDED, output_path=tmp_path)[0] == 0
    for given in (tmp_path, tmp_path / "global_step_0"):
        assert_refused(to_dcp(hf_path=EMBEDDED, output_path=given), str(tmp_path / "global_step_0"), "exists already")


def test_checkpoints_behind_a_url(make_model, base_of, to_hf, to_dcp, assert_refused, assert_same_model, tmp_path):
    model = make_model(tied=False)
    model.save_pretrained(tmp_path / "hf")
    root = f"memory://{tmp_path.name}"
    assert to_dcp(hf_path=tmp_path / "hf", output_path=root)[0] == 0
    assert_refused(to_dcp(hf_path=tmp_path / "hf", output_path=root), f"{root}/global_step_0", "exists already")
    code, printed = to_hf(dcp_path=f"{root}/global_step_0", output_path=tmp_path / "out", base_model=base_of(model))
    assert code == 0, printed
    assert_same_model(tmp_path / "out", model)
