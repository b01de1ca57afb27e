"""A critic as a Hugging Face directory: a token classifier whose one label is the value, and a critic again."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForTokenClassification

from rlinf_lite.models.build import build_value_model_on_meta, materialize
from rlinf_lite.models.hf_directory import load_config
from rlinf_lite.models.scored import ValueModel
from rlinf_lite.models.segments import FlatTokens
from rlinf_lite.types import Segments
from rlinf_lite.weights.hf import HfWeights
from rlinf_lite.weights.live import fill
from rlinf_lite.weights.names import WeightNames, named_weights

INPUT_IDS = torch.tensor([[1, 5, 3, 2], [4, 4, 7, 1]])


@pytest.fixture
def critic_of(add_critic, checkpoint_of):
    """``critic_of(model, **info)``: a critic beside a policy, and its section in a checkpoint of both."""

    def make(model, **info):
        config = copy.deepcopy(model.config)
        config.num_labels = 1
        critic = AutoModelForTokenClassification.from_config(config, dtype=torch.float32).eval()
        for param in critic.parameters():
            torch.nn.init.normal_(param, std=0.1)
        state = {"model": dict(named_weights(critic)), "optim": {"w": {"exp_avg": torch.ones(2)}}}
        return critic, add_critic(checkpoint_of(model, **info), state) / "critic"

    return make


def values(model):
    """As the trainer computes them, of every token of two sequences."""
    segments = Segments(start_S=torch.tensor([0, 4]), stop_S=torch.tensor([4, 8]), parent_S=torch.tensor([-1, -1]))
    tokens = FlatTokens.of(INPUT_IDS.flatten(), torch.arange(4).repeat(2), segments)
    with torch.no_grad():
        return ValueModel(model)(tokens.ids_N, tokens.positions_N, tokens.layout, torch.arange(8))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
def test_there_and_back(family, make_model, base_of, critic_of, to_hf, tmp_path):
    model, out = make_model(family), tmp_path / "out"
    base = base_of(model)
    critic, section = critic_of(model, model_path=str(tmp_path / "gone"), critic_model_path=str(base))
    code, printed = to_hf(dcp_path=section, output_path=out)
    assert code == 0, printed
    loaded, report = AutoModelForTokenClassification.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.num_labels == 1
    with torch.no_grad():  # with transformers' own attention, which rounds differently
        torch.testing.assert_close(loaded(INPUT_IDS).logits.flatten(), values(critic), rtol=1e-5, atol=1e-6)
    assert torch.equal(values(loaded.eval()), values(critic))
    assert json.loads((out / "config.json").read_text())["architectures"] == [type(critic).__name__]
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()

    again = build_value_model_on_meta(load_config(out, None), "fp32")  # as a run with this critic.model.model_path
    materialize(again, torch.device("cpu"))
    fill(again, HfWeights(out, WeightNames.of(again)))
    assert torch.equal(values(again.eval()), values(critic))
    code, printed = to_hf(dcp_path=section, output_path=tmp_path / "again", base_model=out)
    assert code == 0, printed
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_what_is_refused(make_model, base_of, critic_of, to_hf, assert_refused, tmp_path):
    model, out = make_model(), tmp_path / "out"
    _, section = critic_of(model, model_path=str(base_of(model)))
    remedy = "--base_model is needed: the checkpoint does not name", "had as critic.model.model_path"
    assert_refused(to_hf(dcp_path=section, output_path=out), *remedy)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "cohere", "num_hidden_layers": 1}))
    answer = to_hf(dcp_path=section, output_path=out, base_model=tmp_path / "other")
    assert_refused(answer, f"--dcp_path {section}: ", "has none for the model type cohere", "with --base_model")
    answer = to_hf(dcp_path=section, output_path=out, base_model=base_of(make_model("gpt2"), "gpt"))
    assert_refused(answer, "a checkpoint of another model than --base_model", "missing: transformer.wte.weight")
    assert not out.exists()


def test_a_critic_becomes_no_policy(make_model, base_of, critic_of, to_hf, to_dcp, assert_refused, tmp_path):
    """Its embeddings are those of a policy with tied ones, so its weights would do for one."""
    model, out = make_model(tied=True), tmp_path / "out"
    _, section = critic_of(model, critic_model_path=str(base_of(model)))
    assert to_hf(dcp_path=section, output_path=out)[0] == 0
    answer = to_dcp(hf_path=out, output_path=tmp_path / "again")
    assert_refused(answer, f"--hf_path={out}: holds a LlamaForTokenClassification", "as critic.model.model_path")
    assert not (tmp_path / "again").exists()
