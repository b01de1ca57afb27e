"""Long texts are filtered by their beginning only with tokenizers for which the beginning is enough."""

from __future__ import annotations

import json
import random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlinf_lite.data import long_texts
from rlinf_lite.data.long_texts import beginning, splits_into_words

LETTERS = ["a", "Bc", "the", "\u00e9t\u00e9", "\u6f22", "x\u0301", "\u0627", "'s", "don't", "12", "3.5", "  ", "\n"]
LETTERS += [" \n\t", "\u00a0", "#", "...", "<|end|>", "<|end", "|>", "\U0001f680", "\u2028", "-", "a" * 30]
LETTERS += [" a", " the", " "] * 5


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def by_bytes(use_regex: bool, prefix: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=use_regex)


QWEN, LLAMA = sorted(long_texts._PATTERNS)
KNOWN = {
    "gpt2": by_bytes(True),
    "qwen": pre_tokenizers.Sequence([split(QWEN), by_bytes(False)]),
    "llama": pre_tokenizers.Sequence([split(LLAMA), by_bytes(False)]),
    "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_bytes(True)]),
}
OTHERS = {
    "no split": by_bytes(False),
    "a blank before": by_bytes(True, prefix=True),
    "another pattern": pre_tokenizers.Sequence([split(r"\p{L}+ \p{L}+|."), by_bytes(False)]),
    "removed": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN), "removed"), by_bytes(False)]),
    "two": pre_tokenizers.Sequence([split(QWEN), by_bytes(True)]),
    "metaspace": pre_tokenizers.Metaspace(),
}


def made(pre_tokenizer, normalizer=None, added=("<|end|>",)) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        core.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=350, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([" ".join(LETTERS)] * 4 + ["the a the Bc don't the"] * 5, trainer)
    core.add_tokens(list(added))
    return core


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
def test_tokens_of_two_parts_are_those_of_the_whole(name, normalizer):
    core, draw = made(KNOWN[name], normalizer), random.Random(name)
    assert splits_into_words(core)
    num_cuts = 0
    for _ in range(150):
        text = "".join(draw.choice(LETTERS) for _ in range(60))
        whole = core.encode(text, add_special_tokens=False).ids
        for found in long_texts._WORD_END.finditer(text):
            parts = [text[: found.end()], text[found.end() :]]
            assert [id for part in parts for id in core.encode(part, add_special_tokens=False).ids] == whole
            num_cuts += 1
    assert num_cuts > 100


@pytest.mark.parametrize("name", OTHERS)
def test_unknown_tokenizers_read_the_whole_text(name):
    assert not splits_into_words(made(OTHERS[name]))


@pytest.mark.parametrize(
    "token", ["a b", AddedToken("<x>", lstrip=True), AddedToken("<x>", rstrip=True), AddedToken("x", single_word=True)]
)
def test_added_tokens_across_words_need_the_whole_text(token):
    assert not splits_into_words(made(KNOWN["qwen"], added=[token]))
    assert not splits_into_words(made(KNOWN["qwen"], normalizers.Lowercase()))


def test_beginnings():
    assert beginning("a b" * 10, 100) is None
    assert beginning("x" * 100_000, 100) is None
    text = "word " * 1000
    assert beginning(text, 100) == text[: len(beginning(text, 100))] and len(beginning(text, 100)) in range(606, 612)


def test_the_same_rows_are_filtered(load, tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made(KNOWN["qwen"]))
    draw = random.Random(0)
    lengths = [draw.choice([5, 40, 900]) for _ in range(300)]
    texts = ["".join(draw.choices(["the ", "a ", "12", "\u6f22"], k=length)) for length in lengths]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "answer": "1"}) + "\n" for text in texts))
    loaded = load(str(path), tokenizer=tokenizer, max_prompt_length=40)
    expected = [tuple(ids) for ids in tokenizer(texts)["input_ids"] if len(ids) <= 40]
    assert [problem.prompt_ids for problem in loaded.problems] == expected and 0 < len(expected) < 300
    assert loaded.num_filtered == 300 - len(expected)
