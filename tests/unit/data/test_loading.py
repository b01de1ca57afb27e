"""Loading in batches gives the same tokens as row by row, takes little memory, never hangs, and logs its progress."""

from __future__ import annotations

import json
import os
import re
import threading
import tracemalloc
from concurrent.futures import CancelledError

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rlinf_lite.config import DataConfig
from rlinf_lite.data import DataError, problems, progress
from rlinf_lite.data.identity import fingerprint
from rlinf_lite.data.json_array import elements

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = [
    "apples",
    "Ann's",
    "12",
    "3.5",
    "\u00e9t\u00e9",
    "\u6f22\u5b57",
    "\U0001f680",
    "x\u0301",
    "<|im_end|>",
    "  ",
    "\n\n",
    "\t",
]
SHOTS = [{"question": "1+2", "answer": 3}, {"question": "caf\u00e9?", "answer": "\u2713"}]


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a begin-of-sequence token; its file asks for padding and truncation."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([" ".join(WORDS)] * 3 + ["How many apples does Ann have?"], trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    core.enable_padding(pad_id=1, length=50)
    core.enable_truncation(4)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", chat_template=CHATML)


def texts(num_rows: int) -> list[str]:
    return [
        " ".join(WORDS[(row * step + step) % len(WORDS)] for step in range(1, 3 + row % 40)) for row in range(num_rows)
    ]


def test_batches_equal_row_by_row_with_a_chat_template(load, jsonl, bpe):
    asked = texts(300)
    path = jsonl({"prompt": text, "answer": str(row)} for row, text in enumerate(asked))
    changes = {"few_shot": SHOTS, "system_prompt": "S\u00e4chlich.", "prompt_template": "Q: {prompt}\n"}
    loaded = load(path, tokenizer=bpe, apply_chat_template=True, max_prompt_length=150, **changes)
    expected = []
    for row, text in enumerate(asked):
        chat = [{"role": "system", "content": "S\u00e4chlich."}]
        for question, answer in (("1+2", "3"), ("caf\u00e9?", "\u2713")):
            chat += [{"role": "user", "content": f"Q: {question}\n"}, {"role": "assistant", "content": answer}]
        chat.append({"role": "user", "content": f"Q: {text}\n"})
        prompt = bpe.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tuple(bpe(prompt, add_special_tokens=False)["input_ids"])
        if len(ids) <= 150:
            expected.append((len(expected), prompt, str(row), ids, f"train.jsonl:{row + 1}"))
    found = [(p.problem_id, p.prompt, p.answer, p.prompt_ids, p.source) for p in loaded.problems]
    assert found == expected and 0 < len(found) < 300
    assert loaded.num_filtered == 300 - len(found)
    assert loaded.max_token_id == max(max(ids) for _, _, _, ids, _ in expected)
    assert loaded.fingerprint == fingerprint(loaded.problems)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_batches_equal_row_by_row_as_text(load, jsonl, bpe, monkeypatch, num_workers):
    monkeypatch.setattr(problems, "_BATCH_ROWS", 7)
    asked = texts(200)
    path = jsonl({"prompt": text, "answer": "1", "level": row} for row, text in enumerate(asked))
    changes = {"few_shot": SHOTS, "metadata_keys": ["level"], "num_workers": num_workers}
    loaded = load(path, tokenizer=bpe, max_prompt_length=10_000, **changes)
    before = "1+2 3\n\ncaf\u00e9? \u2713\n\n"
    assert [p.prompt for p in loaded.problems] == [before + text for text in asked]
    assert [p.prompt_ids for p in loaded.problems] == [tuple(bpe(before + text)["input_ids"]) for text in asked]
    assert [p.metadata for p in loaded.problems] == [{"level": row} for row in range(200)]
    assert loaded.fingerprint == fingerprint(loaded.problems, with_metadata=True)


def test_the_fingerprint_is_that_of_earlier_versions(load, jsonl):
    """Existing checkpoints hold it: they could not be resumed with another one."""
    rows = [{"prompt": "1+1=", "answer": "2", "m": {"b": 1}}, {"prompt": "10+12=", "answer": 22, "m": {"b": None}}]
    path = jsonl(rows)
    plain, with_metadata = load(path).fingerprint, load(path, metadata_keys=["m.b"]).fingerprint
    assert plain == "a18f651b38e98dbb2269e5cd4650710f8b6b77abb411253841fbf09ff4e6417b"
    assert with_metadata == "50a94d8782495e0ea5e83a1df5658d42d57b7af07f4d9b1cf827a87457693562"


def test_a_tokenizer_with_its_own_call_method(load, jsonl, tokenizer):
    class Reversing(PreTrainedTokenizerFast):
        def _encode_plus(self, *args, **kwargs):
            found = super()._encode_plus(*args, **kwargs)
            found["input_ids"] = [ids[::-1] for ids in found["input_ids"]]
            return found

    own = Reversing(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<bos>")
    path = jsonl([{"prompt": "1+2", "answer": "3"}])
    (plain,), (reversed_,) = load(path).problems, load(path, tokenizer=own).problems
    assert reversed_.prompt_ids == plain.prompt_ids[::-1]


def test_problems_are_a_sequence(load, jsonl):
    stored = load(jsonl({"prompt": f"{row}+1", "answer": "1"} for row in range(5))).problems
    assert [p.problem_id for p in stored[1:4]] == [1, 2, 3] and stored[-1] == stored[4] and len(stored) == 5
    with pytest.raises(IndexError):
        stored[5]


@pytest.mark.parametrize(
    "name", ["train.jsonl", "train.json", "train.csv", "train.parquet", "train.jsonl.gz", "directory"]
)
def test_a_pipe_is_refused_without_waiting(load, tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(
        DataError, match=r"data\.train_data_paths: '.*' is a named pipe \(FIFO\), .* write the data to a file"
    ):
        load(str(tmp_path / name))


def test_a_device_is_refused(load, tmp_path):
    (tmp_path / "endless.jsonl").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="is a device"):
        load(str(tmp_path / "endless.jsonl"))


def test_a_directory_named_like_a_file_and_a_pipe_in_a_saved_data_set(load, tmp_path):
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(DataError, match="not written by datasets"):
        load(str(tmp_path / "rows.jsonl"))
    (tmp_path / "rows.jsonl" / "state.json").write_text("{}")
    os.mkfifo(tmp_path / "rows.jsonl" / "dataset_info.json")
    with pytest.raises(DataError, match=r"is a named pipe \(FIFO\)"):
        load(str(tmp_path / "rows.jsonl"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission(load, jsonl):
    path = jsonl([{"prompt": "1", "answer": "1"}])
    os.chmod(path, 0)
    with pytest.raises(DataError, match="Permission denied; make it readable"):
        load(path)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1 << 20])
def test_a_json_array_in_any_pieces(size):
    rows = [{"a": "\u6f22\U0001f680\u2028", "b": [1, {"c": "]"}]}, 12, -0.5e3, "x", [], {}, None, True, 123456]
    for text in (json.dumps(rows, ensure_ascii=False), json.dumps(rows, indent=2), json.dumps(rows[1:2]), " [ ] \n"):
        content = b"\xef\xbb\xbf" + text.encode()
        pieces = [content[at : at + size] for at in range(0, len(content), size)]
        assert [value for value, _ in elements(pieces, "x.json")] == json.loads(text)
        assert [json.loads(part) for _, part in elements(pieces, "x.json")] == json.loads(text)


@pytest.mark.parametrize(
    "text", ["[", "[1", "[1,", "[1,]", "[1 2]", "[1]]", "[1] x", '[{"a": 1}\n,\n{"a" 2}]', '["a', "[nul]", "[,1]", ""]
)
@pytest.mark.parametrize("size", [1, 1 << 20])
def test_errors_in_a_json_array_are_those_of_the_json_library(text, size):
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    content, at = text.encode(), expected.value
    place = f"line {at.lineno} column {at.colno}" if at.lineno > 1 else f"column {at.colno}"
    with pytest.raises(DataError) as caught:
        list(elements([content[at : at + size] for at in range(0, len(content), size)], "x.json"))
    assert f"at {place})" in str(caught.value)


def test_a_large_json_array_is_not_held_in_memory(load, tmp_path, monkeypatch):
    """Only a few pieces of an array of 20 MB are in memory at any time."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "1+1=", "answer": "2", "unused": "x" * 10_000}] * 2000))
    tracemalloc.start()
    load(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6


def test_reading_is_logged(load, jsonl, capsys, monkeypatch):
    monkeypatch.setattr(problems, "_BATCH_ROWS", 100)
    path = jsonl({"prompt": f"{row}+1=", "answer": row} for row in range(1000))
    load(path)
    assert capsys.readouterr().out == ""  # it took less than a second
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(progress, "_SHOWN_FROM_SECONDS", 0.0)
    load(path)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and re.fullmatch(r"data: read train.jsonl: 1,000 rows, [0-9.]+ kB in 0\.\d s", lines[-1])
    assert lines[0].startswith("data: reading train.jsonl: 100 rows in ") and re.search(
        r"% of [0-9.]+ kB \.\.\.$", lines[0]
    )


def test_loading_ends_when_it_is_cancelled(jsonl, tokenizer):
    stop = threading.Event()
    stop.set()
    path = jsonl([{"prompt": "1", "answer": "1"}])
    with pytest.raises(CancelledError):
        problems.load_problems(DataConfig(train_data_paths=[path]), "train", tokenizer, stop=stop)
