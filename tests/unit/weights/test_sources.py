"""One model from a live module, a Hugging Face directory and a checkpoint: the same names, order, shapes and bits."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from rlinf_lite.checkpoint import Checkpointer, StateMismatch
from rlinf_lite.errors import ConfigError
from rlinf_lite.weights.dcp import DcpWeights
from rlinf_lite.weights.hf import HfWeights
from rlinf_lite.weights.live import LiveWeights, local_pieces
from rlinf_lite.weights.names import WeightNames, listed, named_weights
from rlinf_lite.weights.source import whole_pieces
from rlinf_lite.weights.transport import pack, unpack

CONFIGS = {
    "gpt2": GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=32),
    "llama": LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=False,
    ),
}


@pytest.fixture
def make_model():
    def make(family):
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float32)

    return make


@pytest.mark.parametrize("family", CONFIGS)
def test_three_sources_give_the_same_weights(family, make_model, tmp_path):
    model = make_model(family)
    names = WeightNames.of(model)
    model.save_pretrained(tmp_path / "hf")
    path = Checkpointer(tmp_path).save(1, {"model": dict(named_weights(model))}, info={"tied": names.tied}).path
    sources = [LiveWeights(model), HfWeights(tmp_path / "hf", names), DcpWeights(path / "actor", names)]
    for dtype in (torch.float32, torch.bfloat16):
        expected = [(name, 0, tensor.detach().to(dtype)) for name, tensor in named_weights(model)]
        for source in sources:
            pieces = list(whole_pieces(source, dtype))
            assert [piece[:2] for piece in pieces] == [piece[:2] for piece in expected]
            assert all(torch.equal(mine.rows, rows) for mine, (_, _, rows) in zip(pieces, expected, strict=True))
            assert list(source.shapes.items()) == list(names.shapes.items())
            assert {source.dtype(name) for name in source.shapes} == {torch.float32}


def test_names_of_a_tied_model_with_a_prefix(make_model):
    names = WeightNames.of(make_model("gpt2"))
    assert names.tied == {"lm_head.weight": "transformer.wte.weight"}
    assert "lm_head.weight" not in names.shapes
    assert names.stored_names("transformer.wte.weight") == ["transformer.wte.weight", "lm_head.weight", "wte.weight"]
    assert names.stored_names("transformer.ln_f.bias") == ["transformer.ln_f.bias", "ln_f.bias"]


def test_rows_of_a_file(make_model, tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    source = HfWeights(tmp_path, WeightNames.of(model))
    weight = model.lm_head.weight.detach()
    for first_row, num_rows in ((0, 20), (3, 5), (19, 1), (20, 0)):
        rows = source.read_rows("lm_head.weight", first_row, num_rows)
        assert torch.equal(rows, weight[first_row : first_row + num_rows])


def test_a_tie_stored_twice_must_be_equal(make_model, tmp_path):
    model = make_model("gpt2")
    model.save_pretrained(tmp_path)
    source = HfWeights(tmp_path, WeightNames.of(model))
    source.check_ties()
    stored = load_file(tmp_path / "model.safetensors")
    save_file({**stored, "lm_head.weight": torch.ones(20, 16), "more": torch.ones(1)}, tmp_path / "model.safetensors")
    source = HfWeights(tmp_path, WeightNames.of(model), where=f"--hf_path {tmp_path}")
    with pytest.raises(ConfigError, match=r"^--hf_path .*: lm_head\.weight differs from transformer\.wte\.weight"):
        source.check_ties()
    assert source.unused == ["more"]


def test_a_checkpoint_of_another_model_is_refused_by_name(make_model, tmp_path):
    model = make_model("llama")
    tensors = {name: tensor.detach() for name, tensor in named_weights(model)}
    names = WeightNames.of(model)
    tensors["extra.weight"] = tensors.pop("lm_head.weight")
    path = Checkpointer(tmp_path).save(1, {"model": tensors}).path
    with pytest.raises(StateMismatch) as caught:
        DcpWeights(path / "actor", names, tied={"lm_head.weight": "model.embed_tokens.weight"}, base="model_path")
    for text in (
        "of another model than model_path",
        "missing: lm_head.weight (tied to",
        "not in the base model: extra",
    ):
        assert text in str(caught.value)


def test_packed_pieces_come_back_as_they_were(make_model):
    model = make_model("gpt2").bfloat16()
    model.register_buffer("scalar", torch.tensor(3.5))
    pieces = list(local_pieces(dict(named_weights(model)), torch.bfloat16))
    back = list(unpack(pack(pieces)))
    assert [piece[:2] for piece in back] == [piece[:2] for piece in pieces]
    for mine, given in zip(back, pieces, strict=True):
        assert mine.rows.dtype == given.rows.dtype
        assert torch.equal(mine.rows.reshape(given.rows.shape), given.rows)


def test_a_long_list_is_shortened():
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(i) for i in range(12)], 3) == "0, 1, 2 and 9 more"
