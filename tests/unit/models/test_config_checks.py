"""The names that configs are checked against are all those of transformers, though the usual ones import nothing."""

from __future__ import annotations

from transformers.activations import ACT2FN

from rlinf_lite.models import config_checks


def test_the_names_are_those_of_transformers():
    names = config_checks._Activations()
    assert ACT2FN.keys() > config_checks._USUAL and "silu" in names
    assert "quick_gelu" in names and "nosuch" not in names
    assert list(names) == list(ACT2FN) and len(names) > 0
    assert type(names["relu"]) is type(ACT2FN["relu"])
