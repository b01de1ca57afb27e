"""Numeric answers of every file format become plain decimals, exactly as stored."""

from __future__ import annotations

from decimal import Decimal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlinf_lite.data import DataError
from rlinf_lite.data.numbers import number_text

TENTH = np.float32(0.1)


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("72", "72"),
        ("-0", "0"),
        ("9007199254740993", "9007199254740993"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("1.5", "1.5"),
        ("1.50", "1.5"),
        ("5.0", "5.0"),
        ("-0.0", "0.0"),
        ("0.1", "0.1"),
        ("0.00001", "0.00001"),
        ("1e-5", "0.00001"),
        ("-2.5E-7", "-0.00000025"),
        ("1e16", "10000000000000000"),
        ("1e22", "10000000000000000000000"),
        ("1E+23", "100000000000000000000000"),
        ("12345678901234567.5", "12345678901234567.5"),
        ("0.30000000000000004", "0.30000000000000004"),
        ("3.14159265358979323846", "3.14159265358979323846"),
        ("1e-400", "0." + "0" * 399 + "1"),
        ("1e400", "1" + "0" * 400),
        ("[0.00001]", "0.00001"),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_numbers_of_json(load, tmp_path, ending, written, text):
    row = f'{{"prompt": "1", "solution": {{"value": {written}}}}}'
    path = tmp_path / f"rows.{ending}"
    path.write_text(f"[{row}]" if ending == "json" else row)
    assert load(str(path), answer_key="solution.value").problems[0].answer == text


@pytest.mark.parametrize("number", ["1e5000", "-1e-5000", "1e999999999"])
def test_a_number_with_too_many_digits_is_refused(load, tmp_path, number):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"prompt": "1", "answer": {number}}}')
    with pytest.raises(
        DataError, match=r":1: the answer 'answer' is a number of more than 4300 digits; write it as text"
    ):
        load(str(path))


ARROW = [
    (pa.array([9007199254740993], pa.int64()), "9007199254740993"),
    (pa.array([2**64 - 1], pa.uint64()), "18446744073709551615"),
    (pa.array([1e-05], pa.float64()), "0.00001"),
    (pa.array([1e22], pa.float64()), "10000000000000000000000"),
    (pa.array([TENTH], pa.float32()), "0.1"),
    (pa.array([np.float32(1e20)], pa.float32()), "100000000000000000000"),
    (pa.array([np.float32(72)], pa.float32()), "72.0"),
    (pa.array([np.float16(0.1)], pa.float16()), "0.1"),
    (pa.array([Decimal("0.00001")], pa.decimal128(20, 5)), "0.00001"),
    (pa.array([Decimal("1E+6")], pa.decimal128(20, 2)), "1000000.00"),
    (pa.array([Decimal("-0.00")], pa.decimal128(20, 2)), "0.00"),
    (pa.array([["0.1"]], pa.list_(pa.string())), "0.1"),
    (pa.array([[TENTH]], pa.list_(pa.float32())), "0.1"),
]


@pytest.mark.parametrize(("column", "text"), ARROW)
def test_numbers_of_parquet(load, tmp_path, column, text):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["1"], "answer": column}), path)
    assert load(str(path)).problems[0].answer == text


def test_nested_numbers_of_parquet_and_saved_data_sets(load, tmp_path):
    table = pa.table({"prompt": ["1"], "x": pa.array([{"y": TENTH}], pa.struct([("y", pa.float32())]))})
    pq.write_table(table, tmp_path / "rows.parquet")
    loaded = load(str(tmp_path / "rows.parquet"), answer_key="x.y", metadata_keys=["x"])
    assert loaded.problems[0].answer == "0.1" and loaded.problems[0].metadata["x"]["y"] == float(TENTH)
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    assert load(str(tmp_path / "saved"), answer_key="x.y").problems[0].answer == "0.1"


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array([True]), "bool"),
        (pa.array([None], pa.float32()), "null"),
        (pa.array([float("nan")], pa.float32()), "nan"),
        (pa.array([float("inf")]), "inf"),
        (pa.array([0], pa.timestamp("ms")), "datetime"),
        (pa.array([0], pa.date32()), "date"),
        (pa.array([b"5"]), "bytes"),
    ],
)
def test_values_that_are_not_numbers_are_refused(load, tmp_path, column, kind):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["1"], "answer": column}), path)
    with pytest.raises(DataError) as caught:
        load(str(path))
    assert f":1: the answer 'answer' is {kind}, not text or a number; write it as text" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.int64(3), "3"),
        (np.float32(0.1), "0.1"),
        (np.float64(1e-5), "0.00001"),
        (np.bool_(True), None),
        (np.float32("nan"), None),
        (True, None),
        ("5", None),
        (None, None),
    ],
)
def test_scalars(value, text):
    assert number_text(value) == text


def test_numbers_of_csv_stay_as_they_are(load, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,answer\n1,1e-5\n")
    assert load(str(path)).problems[0].answer == "1e-5"
