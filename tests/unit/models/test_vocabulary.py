"""Tokens that end a response, and tokens of the tokenizer that the model has no embedding for."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from rlinf_lite.errors import ConfigError
from rlinf_lite.models import vocabulary


def tokenizer(eos=None, pad=None, vocab=()):
    return SimpleNamespace(eos_token_id=eos, pad_token_id=pad, get_vocab=lambda: {str(id): id for id in vocab})


@pytest.fixture
def model_dir(tmp_path):
    def write(**files):
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("listed", "of_tokenizer", "expected"),
    [([7, 9], 2, {2, 7, 9}), (5, 2, {2, 5}), (5, None, {5}), (None, 2, {2}), ([7, None], 2, {2, 7}), ([], 2, {2})],
)
@pytest.mark.parametrize("name", ["generation_config", "config"])
def test_eos_ids(model_dir, name, listed, of_tokenizer, expected):
    directory = model_dir(**{name: {"eos_token_id": listed}})
    assert vocabulary.eos_ids(directory, tokenizer(eos=of_tokenizer)) == expected


def test_eos_ids_of_config_json_count_where_the_generation_config_has_none(model_dir):
    config = {"eos_token_id": [7, 8], "vocab_size": 10}
    assert vocabulary.eos_ids(model_dir(config=config), tokenizer(eos=2)) == {2, 7, 8}
    assert vocabulary.eos_ids(model_dir(generation_config={"do_sample": True}), tokenizer(eos=2)) == {2, 7, 8}
    assert vocabulary.eos_ids(model_dir(generation_config={"eos_token_id": 9}), tokenizer(eos=2)) == {2, 9}


def test_eos_ids_of_the_text_part_of_a_model(model_dir):
    assert vocabulary.eos_ids(model_dir(config={"text_config": {"eos_token_id": [5]}}), tokenizer()) == {5}


@pytest.mark.parametrize("listed", ["2", [2, "</s>"], True, -1, [2, -100], 1.5, {"id": 2}])
@pytest.mark.parametrize("name", ["generation_config", "config"])
def test_an_invalid_eos_id_is_refused_with_its_file(model_dir, name, listed):
    with pytest.raises(ConfigError, match=rf"{name}\.json: eos_token_id has .*, which is not a token id; write"):
        vocabulary.eos_ids(model_dir(**{name: {"eos_token_id": listed}}), tokenizer(eos=2))


def test_no_eos_anywhere(tmp_path):
    with pytest.raises(ConfigError, match=r"neither the tokenizer, nor generation_config\.json, nor config\.json has"):
        vocabulary.eos_ids(tmp_path, tokenizer())


def test_an_eos_token_that_the_model_cannot_sample(model_dir):
    directory = model_dir(config={"vocab_size": 10})
    with pytest.raises(ConfigError, match="the eos token is 10, but the model has only the tokens 0 to 9"):
        vocabulary.eos_ids(directory, tokenizer(eos=10))
    assert vocabulary.eos_ids(directory, tokenizer(eos=9)) == {9}
    directory = model_dir(generation_config={"eos_token_id": [3, 50256]})
    assert vocabulary.eos_ids(directory, tokenizer(eos=9)) == {3, 9, 50256}


def test_a_broken_generation_config_is_named_with_its_line(tmp_path):
    (tmp_path / "generation_config.json").write_text('{\n"eos_token_id": [7,\n}')
    with pytest.raises(ConfigError, match=r"generation_config\.json: not valid JSON at line 3 column 1 .*hf download"):
        vocabulary.eos_ids(tmp_path, tokenizer(eos=2))


def test_prompts_with_tokens_without_embedding(tmp_path):
    small, padded = LlamaConfig(vocab_size=10), LlamaConfig(vocab_size=64)
    vocabulary.check_prompts(9, tmp_path / "tok", {tmp_path / "small": small, tmp_path / "padded": padded})
    with pytest.raises(ConfigError) as caught:
        vocabulary.check_prompts(10, tmp_path / "tok", {tmp_path / "padded": padded, tmp_path / "small": small})
    assert str(caught.value).startswith(
        f"actor.tokenizer.tokenizer_model={tmp_path / 'tok'}: prompts have the token 10, but the model in "
        f"{tmp_path / 'small'} has only 10 (0 to 9"
    )


def test_tokens_that_no_prompt_uses_give_a_warning(tmp_path):
    config = LlamaConfig(vocab_size=10)
    assert vocabulary.more_tokens_than_model(tokenizer(vocab=range(10)), tmp_path, config, tmp_path) is None
    line = vocabulary.more_tokens_than_model(tokenizer(vocab=[0, 12]), tmp_path / "tok", config, tmp_path / "model")
    assert "has ids up to 12" in line and "only up to 9" in line and "tok" in line and "model" in line
