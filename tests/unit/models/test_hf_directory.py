"""Model directories are found or refused by name, and identified by their content."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import CohereConfig, GPT2Config, LlamaConfig

from rlinf_lite.errors import ConfigError
from rlinf_lite.models import hf_directory


def change_one_weight(path, name, index):
    stored = load_file(path)
    stored[name].view(-1)[index] += 1.0
    save_file(stored, path, {"format": "pt"})


def test_a_missing_directory_is_named_with_its_key(tmp_path):
    with pytest.raises(
        ConfigError, match=r"rollout\.model\.model_path=.*nowhere: no model found .*config\.json.*Hugging Face"
    ):
        hf_directory.resolve(str(tmp_path / "nowhere"), "rollout.model.model_path")


def test_an_unknown_embedded_model_lists_the_known(tmp_path):
    with pytest.raises(ConfigError, match=r"actor\.model\.model_path=embedded:tony: .*known: embedded:tiny-arithmetic"):
        hf_directory.resolve("embedded:tony")
    assert (hf_directory.resolve("embedded:tiny-arithmetic") / "model.safetensors").is_file()


def test_model_type_must_be_the_directories(tiny_directory):
    path = tiny_directory("qwen2")
    with pytest.raises(
        ConfigError, match=r"actor\.model\.model_type=llama: .*qwen2 holds a qwen2; write that, or null"
    ):
        hf_directory.load_config(path, "llama")
    for accepted in ("qwen2", "qwen2.5", None):
        assert hf_directory.load_config(path, accepted).model_type == "qwen2"


def test_the_type_of_a_critic_has_a_token_classifier(tmp_path):
    for config in (GPT2Config(), LlamaConfig()):
        hf_directory.check_critic(config, tmp_path)
    with pytest.raises(ConfigError, match=r"critic\.model\.model_path=.*no token classifier for .* cohere"):
        hf_directory.check_critic(CohereConfig(), tmp_path)


@pytest.mark.parametrize("of", [GPT2Config(n_positions=64), LlamaConfig(max_position_embeddings=64)])
def test_rows_longer_than_the_models_positions_are_refused(of):
    hf_directory.check_length(of, 64)
    with pytest.raises(ConfigError, match=r"runner.seq_length=65: .* positions for 64 tokens .* use at most 64"):
        hf_directory.check_length(of, 65)


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}, 64),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8,
                "rope_theta": 1e4,
            },
            64,
        ),
    ],
)
def test_positions_that_are_stretched(rope, limit):
    stretched = LlamaConfig(max_position_embeddings=64, rope_parameters=rope)
    hf_directory.check_length(stretched, limit)
    with pytest.raises(ConfigError, match=f"positions for {limit} tokens"):
        hf_directory.check_length(stretched, limit + 1)


def test_a_config_that_cannot_be_read_is_a_config_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(ConfigError, match=r"actor\.model\.model_path=.*no-such-architecture"):
        hf_directory.load_config(tmp_path, None)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"actor\.model\.model_path="):
        hf_directory.load_config(tmp_path, None)


def test_a_directory_without_tokenizer_is_a_config_error(tiny_directory):
    with pytest.raises(ConfigError, match=r"actor\.tokenizer\.tokenizer_model=.*llama"):
        hf_directory.load_tokenizer(tiny_directory("llama"))


def test_fingerprint_depends_on_content_not_location(tiny_directory, tmp_path):
    path = tiny_directory("llama")
    first = hf_directory.fingerprint(path)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(path, elsewhere)
    (elsewhere / "notes.md").write_text("not read by anyone")
    assert hf_directory.fingerprint(elsewhere) == first
    change_one_weight(elsewhere / "model.safetensors", "model.layers.1.mlp.up_proj.weight", 17)
    assert hf_directory.fingerprint(elsewhere) != first
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    assert hf_directory.fingerprint(path) != first


def test_fingerprint_of_a_large_file_reads_samples_of_all_of_it(tmp_path):
    file = tmp_path / "model.safetensors"
    content = bytearray(bytes(range(251)) * 40_000)  # 10 MB, sampled
    file.write_bytes(content)
    first = hf_directory.fingerprint(tmp_path)
    for place in (0, len(content) - 1):
        changed = content.copy()
        changed[place] ^= 1
        file.write_bytes(changed)
        assert hf_directory.fingerprint(tmp_path) != first
    file.write_bytes(content + b"x")
    assert hf_directory.fingerprint(tmp_path) != first


def test_the_digest_of_an_architecture_does_not_depend_on_where_it_is(tmp_path):
    here = hf_directory.resolve("embedded:tiny-arithmetic")
    there = shutil.copytree(here, tmp_path / "moved")
    assert hf_directory.config_digest(hf_directory.load_config(here, None)) == hf_directory.config_digest(
        hf_directory.load_config(there, None)
    )
    other = json.loads((there / "config.json").read_text()) | {"hidden_act": "relu"}
    (there / "config.json").write_text(json.dumps(other))
    assert hf_directory.config_digest(hf_directory.load_config(here, None)) != hf_directory.config_digest(
        hf_directory.load_config(there, None)
    )
