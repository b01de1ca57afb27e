"""The embedded default model is an ordinary Hugging Face directory and starts where GRPO has something to learn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlinf_lite.models.embedded
from rlinf_lite.models.embedded import make_tiny_arithmetic

DIRECTORY = Path(rlinf_lite.models.embedded.__file__).parent / "tiny-arithmetic"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DIRECTORY)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DIRECTORY).eval()


@pytest.fixture(scope="module")
def sums():
    return make_tiny_arithmetic.Sums(make_tiny_arithmetic.build_tokenizer())


def test_every_character_is_a_token(tokenizer) -> None:
    ids = tokenizer("57+38=")["input_ids"]
    assert len(ids) == 7
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "57+38="
    assert tokenizer.decode([*ids, tokenizer.eos_token_id]) == "<bos>57+38=<eos>"
    assert len(tokenizer) == 20


def test_text_comes_back_unchanged(tokenizer) -> None:
    text = make_tiny_arithmetic.CHARACTERS[::-1]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_unknown_characters_are_one_token_each(tokenizer) -> None:
    ids = tokenizer("a1b", add_special_tokens=False)["input_ids"]
    assert ids == [tokenizer.unk_token_id, tokenizer.convert_tokens_to_ids("1"), tokenizer.unk_token_id]


def test_prompts_are_padded_on_the_left(tokenizer) -> None:
    batch = tokenizer(["1+2=", "57+38="], padding=True)["input_ids"]
    assert batch[0][:2] == [tokenizer.pad_token_id] * 2
    assert batch[0][2] == tokenizer.bos_token_id


def test_ids_of_model_and_tokenizer_agree(model, tokenizer) -> None:
    for config in (model.config, model.generation_config):
        assert config.bos_token_id == tokenizer.bos_token_id
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id


def test_embeddings_are_tied(model) -> None:
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 99_904
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_grpo_has_something_to_learn(model, sums) -> None:
    assert sums.sampled_accuracy(model) == pytest.approx(0.35, abs=0.02)


def test_sampling_agrees_with_the_exact_accuracy(model, tokenizer) -> None:
    generator = torch.Generator().manual_seed(0)
    operands_N2 = torch.randint(10, 100, (600, 2), generator=generator)
    texts = [f"{a}+{b}=" for a, b in operands_N2.tolist()]
    inputs = tokenizer(texts, return_tensors="pt")
    torch.manual_seed(0)
    sampled = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=make_tiny_arithmetic.MAX_NEW_TOKENS,
    )
    answers = [row.split("=")[1].split("<pad>")[0] for row in tokenizer.batch_decode(sampled)]
    right = [answer == f"{a + b}<eos>" for answer, (a, b) in zip(answers, operands_N2.tolist(), strict=True)]
    assert sum(right) / len(right) == pytest.approx(0.35, abs=0.07)


def test_every_user_may_read_the_files() -> None:
    for path in DIRECTORY.iterdir():
        assert path.stat().st_mode & 0o444 == 0o444, path
    assert sum(path.stat().st_size for path in DIRECTORY.iterdir()) < 600_000


def test_the_script_writes_the_committed_tokenizer_and_config(tmp_path) -> None:
    tokenizer = make_tiny_arithmetic.build_tokenizer()
    make_tiny_arithmetic.write(make_tiny_arithmetic.build_model(tokenizer), tokenizer, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in DIRECTORY.iterdir()}
    assert (tmp_path / "tokenizer.json").read_text() == (DIRECTORY / "tokenizer.json").read_text()
    made, committed = (json.loads((directory / "config.json").read_text()) for directory in (tmp_path, DIRECTORY))
    assert made | {"transformers_version": ""} == committed | {"transformers_version": ""}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}
