"""Fixtures: a character tokenizer of twenty tokens, a loader for one file, and a writer of jsonl files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlinf_lite.config import DataConfig
from rlinf_lite.data import ProblemSet, load_problems

CHARACTERS = ["<pad>", "<bos>", "<eos>", "<unk>", *"0123456789+-*= ?"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    ids = {token: number for number, token in enumerate(CHARACTERS)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<bos>", chat_template=CHAT_TEMPLATE
    )


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    def write(rows: Iterable[Any], name: str = "train.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def load(tokenizer: PreTrainedTokenizerFast) -> Callable[..., ProblemSet]:
    def load_paths(*paths: str, tokenizer: Any = tokenizer, split: Any = "train", **changes: Any) -> ProblemSet:
        given = {f"{split}_data_paths": list(paths)} if paths else {}
        return load_problems(DataConfig(**given, **changes), split, tokenizer)

    return load_paths
