"""The charts as PNG files, where matplotlib is; and a line where it is not."""

from __future__ import annotations

import sys

import pytest

from rlinf_lite.report.__main__ import write

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def test_each_chart_is_a_file(run, tmp_path):
    pytest.importorskip("matplotlib")
    said = write(run, tmp_path / "out", [])
    names = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert {"overview", "reward", "validation_accuracy", "loss", "entropy", "time_by_phase", "memory"} <= names
    assert said[1] == f"{tmp_path / 'out'}/*.png ({len(names)} charts)"
    for path in (tmp_path / "out").glob("*.png"):
        assert path.read_bytes().startswith(SIGNATURE)


def test_without_matplotlib_the_page_is_written_and_a_line_says_how_to_get_pngs(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = write(run, tmp_path / "out", [])
    assert said[1] == "no PNGs: they need matplotlib; pip install -e '.[report]'"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]
