"""Records that are made a field at a time are those that the constructor makes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlinf_lite.columns import columns_of, objects_of, replaced


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    name: str
    size: int | None = None


RECORDS = [Record(name="a", size=1), Record(name="b"), Record(name="c", size=3)]


def test_records_become_columns_and_back():
    columns = columns_of(Record, RECORDS)
    assert columns == {"name": ["a", "b", "c"], "size": [1, None, 3]}
    assert objects_of(Record, columns, 3) == RECORDS
    assert columns_of(Record, []) == {"name": [], "size": []} and objects_of(Record, {"name": [], "size": []}, 0) == []


def test_a_field_is_replaced():
    assert replaced(RECORDS, size=[7, 8, 9]) == [replace(r, size=7 + i) for i, r in enumerate(RECORDS)]
    assert [record.size for record in RECORDS] == [1, None, 3], "the others are not written to"
    assert replaced([], size=[]) == []
