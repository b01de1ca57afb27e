"""A cluster without Ray: see fake_ray.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

for _name in ("fake_ray", "weight_case"):
    _spec = importlib.util.spec_from_file_location(_name, Path(__file__).with_name(f"{_name}.py"))
    assert _spec is not None and _spec.loader is not None
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])


@pytest.fixture
def fake_ray(monkeypatch):
    """All calls of the guard go to fake actors; nothing waits long for a process that does not answer."""
    from fake_ray import FakeRay, Ref

    from rlinf_lite.cluster import group
    from rlinf_lite.cluster.guard import guard
    from rlinf_lite.cluster.workers import handle

    guard.watch(None)
    monkeypatch.setattr(guard, "_ray", FakeRay())
    monkeypatch.setattr(handle, "ObjectRef", Ref)
    monkeypatch.setattr(group, "DEAD_SECONDS", 0.05)
