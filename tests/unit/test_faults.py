"""Faults that strike when a test wants them to; the phases are tried where they are."""

from __future__ import annotations

import json

import pytest

from rlinf_lite import faults


@pytest.fixture
def fault(tmp_path, monkeypatch):
    def make(**fields: object) -> None:
        monkeypatch.setenv(faults.VARIABLE, json.dumps([{"phase": "here", "action": "EIO", **fields}]))
        faults._table.cache_clear()

    yield make
    faults._table.cache_clear()


def test_an_armed_fault_strikes_once(fault, tmp_path):
    armed, mark = tmp_path / "armed", tmp_path / "mark"
    fault(armed=str(armed), mark=str(mark))
    faults.reach("here", step=1)
    assert not mark.exists()
    armed.touch()
    faults.reach("elsewhere", step=1)
    with pytest.raises(OSError, match="Input/output"):
        faults.reach("here", step=2)
    assert mark.exists() and not armed.exists()
    faults.reach("here", step=3)


def test_only_its_step_disarms_a_fault(fault, tmp_path):
    armed = tmp_path / "armed"
    armed.touch()
    fault(armed=str(armed), step=4)
    faults.reach("here", step=3)
    assert armed.exists()
    with pytest.raises(OSError, match="Input/output"):
        faults.reach("here", step=4)
