"""Every kind of file is written and read back; every error names file, line and remedy."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlinf_lite.data import DataError
from rlinf_lite.data.hf_source import HubDataset, parse_hub_path
from rlinf_lite.data.sources import read_rows

KEY = "data.train_data_paths"
ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2=", "answer": "3"}, {"prompt": "2+2=", "answer": "4"}]


def fields(*paths: Path | str) -> list[dict]:
    return [row.fields for row in read_rows([str(path) for path in paths], KEY)]


def refusal(*paths: Path | str) -> str:
    with pytest.raises(DataError) as caught:
        fields(*paths)
    return str(caught.value)


def test_jsonl_in_the_configured_order_with_file_and_line(jsonl):
    first, second = jsonl(ROWS[1:], "b.jsonl"), jsonl(ROWS[:1], "a.jsonl")
    rows = list(read_rows([first, second], KEY))
    assert [row.fields for row in rows] == [ROWS[1], ROWS[2], ROWS[0]]
    assert [row.source for row in rows] == ["b.jsonl:1", "b.jsonl:2", "a.jsonl:1"]
    assert [row.where for row in rows] == [f"{first}:1", f"{first}:2", f"{second}:1"]


def test_crlf_bom_blank_lines_and_no_final_newline(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n   \r\n{"a": 2}\r\n\n{"a": 3}')
    rows = list(read_rows([str(path)], KEY))
    assert [row.fields for row in rows] == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert [row.line for row in rows] == [1, 4, 6]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\u00a0", "\U0001f600"])
def test_unicode_line_separators_do_not_end_a_line(jsonl, separator):
    rows = [{"prompt": f"one{separator}two"}, {"prompt": "three"}]
    assert fields(jsonl(rows)) == rows


def test_gzip(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\r\n{"a": 2}\n'))
    assert fields(path) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("damage", [lambda gz: gz[:-12], lambda gz: b"PK" + gz, lambda gz: gz[:20] + gz[22:]])
def test_broken_gzip_names_the_file(tmp_path, damage):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(damage(gzip.compress(b"".join(b'{"a": %d}\n' % number for number in range(500)))))
    message = refusal(path)
    assert message.startswith(f"{path}: broken gzip file") and "compress it again" in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": 1} {"a": 2}', "not valid JSON (Extra data at column 10)"),
        (b"[1, 2]", "a JSON list instead of an object"),
        (b'"text"', "a JSON str instead of an object"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "a number that cannot be read (Exceeds the limit (4300 digits)"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 0}\n\n' + line + b"\n")
    message = refusal(path)
    assert message.startswith(f"{path}:3: ") and message in message
    assert ";" in message, "a remedy follows the message"


@pytest.mark.parametrize(
    "content",
    [
        b'[{"a": 1}, {"a": 2}]',
        b'\xef\xbb\xbf\r\n[\r\n  {"a": 1},\r\n  {"a": 2}\r\n]\r\n',
        b'{"a": 1}\n\n{"a": 2}\n',
    ],
)
def test_json_is_an_array_or_lines(tmp_path, content):
    path, packed = tmp_path / "rows.json", tmp_path / "rows.json.gz"
    path.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    assert fields(path) == fields(packed) == [{"a": 1}, {"a": 2}]


def test_rows_of_a_json_array_are_counted(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, {"a": 2}]')
    assert [row.where for row in read_rows([str(path)], KEY)] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n{"a": 2}', "not valid JSON (Expecting ',' delimiter at line 2 column 9)"),
        ('[{"a": 1}, 5]', "rows.json:2: a JSON int instead of an object; each element must look like"),
        ('{\n  "data": [{"a": 1}]\n}', "rows.json:1: not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_broken_json_file(tmp_path, content, message):
    path = tmp_path / "rows.json"
    path.write_text(content)
    assert message in refusal(path)


def test_an_array_in_a_jsonl_file_is_refused_with_a_remedy(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('[{"a": 1}, {"a": 2}]')
    assert "is read if its name ends in .json" in refusal(path)


def test_csv(tmp_path):
    path, packed = tmp_path / "rows.csv", tmp_path / "rows.csv.gz"
    content = b'\xef\xbb\xbfprompt,answer\r\n"1, or ""2""\r\nthen?",3\r\n\r\n\xc3\xa9,"1,234"\r\n'
    path.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    expected = [{"prompt": '1, or "2"\r\nthen?', "answer": "3"}, {"prompt": "\u00e9", "answer": "1,234"}]
    assert fields(path) == fields(packed) == expected
    assert [row.line for row in read_rows([str(path)], KEY)] == [3, 5]


def test_a_long_value_in_csv(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f"a\n{'x' * 1_000_000}\n")
    assert len(fields(path)[0]["a"]) == 1_000_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n1\n", "rows.csv:3: fewer values than columns"),
        (b"a,b\n1,2,3\n", "rows.csv:2: more values than columns"),
        (b"a,b,a\n1,2,3\n", "rows.csv:1: two columns are called 'a'"),
        (b'a,b\n1,"2\n', "not valid CSV"),
        (b"a,b\n1,\xff\n", "rows.csv: not UTF-8"),
    ],
)
def test_a_broken_csv_is_named(tmp_path, content, message):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    assert message in refusal(path)


def test_parquet_over_several_batches_and_row_groups(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = [{"prompt": f"{number}+1=", "answer": number + 1} for number in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=700)
    read = list(read_rows([str(path)], KEY))
    assert [row.fields for row in read] == rows
    assert [row.line for row in read] == list(range(1, 3001))
    assert read[2999].source == "rows.parquet:3000"


def test_parquet_chat_lists_come_back_as_lists_of_dicts(tmp_path):
    path, row = tmp_path / "chat.parquet", {"prompt": [{"role": "user", "content": "hi"}]}
    pq.write_table(pa.Table.from_pylist([row]), path)
    assert fields(path) == [row]


@pytest.mark.parametrize("content", [b"", b"not a table at all, only text", b"PAR1" + b"\0" * 40 + b"PAR1"])
def test_broken_parquet_names_the_file(tmp_path, content):
    path = tmp_path / "rows.parquet"
    path.write_bytes(content)
    message = refusal(path)
    assert message.startswith(f"{path}: not a readable parquet file") and "write it again" in message


def test_save_to_disk_round_trip(tmp_path):
    path = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(path)
    rows = list(read_rows([str(path)], KEY))
    assert [row.fields for row in rows] == ROWS
    assert rows[1].source == "saved:2"


def test_a_directory_of_splits_is_refused_with_their_names(tmp_path):
    path = tmp_path / "saved"
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(splits).save_to_disk(path)
    assert refusal(path) == f"{path}: a directory of splits (test, train); name one of them, as {path}/SPLIT"
    assert fields(path / "test") == ROWS[:1]


def test_another_directory_and_a_damaged_saved_one_are_refused(tmp_path):
    assert "not written by datasets.save_to_disk" in refusal(tmp_path)
    path = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(path)
    next(path.glob("*.arrow")).unlink()
    assert refusal(path).startswith(f"{path}: not readable by datasets.load_from_disk")


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("hf:openai/gsm8k:main:train", HubDataset("openai/gsm8k", "main", "train")),
        ("hf:squad:validation", HubDataset("squad", None, "validation")),
        ("hf:openai/gsm8k:main:train[:100]", HubDataset("openai/gsm8k", "main", "train[:100]")),
        ("hf:squad:train[10%:20%]", HubDataset("squad", None, "train[10%:20%]")),
    ],
)
def test_hub_paths(path, parts):
    assert parse_hub_path(path) == parts


@pytest.mark.parametrize("path", ["hf:squad", "hf:", "hf::train", "hf:a:b:c:d", "hf:squad:"])
def test_a_hub_path_of_another_form_is_refused(path):
    assert refusal(path) == f"{path}: expected hf:NAME[:CONFIG]:SPLIT, for example hf:openai/gsm8k:main:train"


def test_hub_reader_on_a_local_directory(tmp_path, jsonl, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    Path(jsonl(ROWS)).rename(tmp_path / "set" / "train.jsonl")
    path = f"hf:{tmp_path}/set:train[1:]"
    rows = list(read_rows([path], KEY))
    assert [row.fields for row in rows] == ROWS[1:]
    assert rows[0].source == f"{path}:1"
    message = refusal(f"hf:{tmp_path}/set:nosuch")
    assert message.startswith(f"hf:{tmp_path}/set:nosuch: ") and "check name, configuration, split" in message


def test_a_missing_file_is_found_before_anything_is_read(tmp_path, jsonl):
    missing = tmp_path / "nosuch.jsonl"
    rows = read_rows([jsonl(ROWS), str(missing)], "data.val_data_paths")
    with pytest.raises(DataError) as caught:
        next(rows)
    message = f"data.val_data_paths: no such file or directory: {str(missing)!r}; correct the path"
    assert str(caught.value).startswith(message)


def test_an_unknown_ending_is_refused_with_the_known_ones(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("a,b\n")
    message = refusal(path)
    assert message.startswith(f"{KEY}: cannot tell how to read {str(path)!r}")
    assert all(
        kind in message for kind in ("*.jsonl,", "*.json,", "*.csv", ".gz", "*.parquet", "save_to_disk", "hf:NAME")
    )


def test_no_paths():
    assert refusal().startswith(f"{KEY}: no path given; list what to read: ")


def test_the_error_can_be_pickled():
    error = pickle.loads(pickle.dumps(DataError("rows.jsonl:3: broken; repair it")))
    assert isinstance(error, ValueError) and str(error) == "rows.jsonl:3: broken; repair it"
