"""A cluster of several nodes for tests of whole runs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ray_nodes():
    """`ray_nodes.ray_nodes`: with ray_nodes(3) as cluster: ..."""
    spec = importlib.util.spec_from_file_location("ray_nodes", Path(__file__).with_name("ray_nodes.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules["ray_nodes"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ray_nodes
