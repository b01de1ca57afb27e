"""A cluster without Ray: see fake_ray.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("fake_ray", Path(__file__).with_name("fake_ray.py"))
assert _spec is not None and _spec.loader is not None
sys.modules["fake_ray"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["fake_ray"])


@pytest.fixture
def fake_ray(monkeypatch):
    """All calls of the guard go to fake actors; nothing waits long for a process that does not answer."""
    from fake_ray import FakeRay

    from rlinf_lite.cluster import group
    from rlinf_lite.cluster.guard import guard

    guard.watch(None)
    monkeypatch.setattr(guard, "_ray", FakeRay())
    monkeypatch.setattr(group, "DEAD_SECONDS", 0.05)
