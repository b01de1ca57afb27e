"""Numbers, sizes and durations as people read them."""

from __future__ import annotations

import math

from rlinf_lite import readable


def test_numbers():
    values = (0, 0.95312, 3.0, 250.4, -12345, 999_999, 2.5e9, 3e-5, math.nan, math.inf)
    expected = ["0", "0.953", "3", "250", "-12.3k", "1.0M", "2.5G", "3.0e-05", "nan", "inf"]
    assert [readable.number(value) for value in values] == expected


def test_counts_keep_at_most_five_characters():
    values = (0, 7, 999, 1000, 5234, 99_949, 99_951, 123_456, 999_400, 999_600, 3.2e9)
    expected = ["0", "7", "999", "1.0k", "5.2k", "99.9k", "100k", "123k", "999k", "1.0M", "3.2G"]
    assert [readable.count(value) for value in values] == expected


def test_sizes():
    values = (0, 12, 999, 1000, 1.47e6, 135e6, 999_999_999, 1.6e9, 3e12)
    expected = ["0 B", "12 B", "999 B", "1.0 kB", "1.5 MB", "135 MB", "1.0 GB", "1.6 GB", "3.0 TB"]
    assert [readable.size(value) for value in values] == expected


def test_percentages():
    assert [readable.percent(value) for value in (0.5, 0, 1.25, math.nan)] == ["50.0 %", "0.0 %", "125.0 %", "nan"]


def test_durations():
    values = (0, 0.00042, 0.0341, 12.34, 250, 11220, 360000, math.nan)
    expected = ["0 s", "0.42 ms", "0.0341 s", "12.3 s", "4 min 10 s", "3 h 07 min", "4 d 4 h", "nan"]
    assert [readable.duration(value) for value in values] == expected
