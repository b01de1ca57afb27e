"""A cluster of several nodes for tests of whole runs."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest


def _still_running(processes: Iterable[psutil.Process], seconds: float) -> list[psutil.Process]:
    _, late = psutil.wait_procs(processes, timeout=seconds)
    found = []
    for process in late:
        try:
            if process.status() != psutil.STATUS_ZOMBIE:  # whose parent may be anybody
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.fixture(scope="session")
def still_running():
    """Those of some processes that have not ended after so many seconds."""
    return _still_running


@pytest.fixture(scope="session")
def ray_nodes():
    """`ray_nodes.ray_nodes`: with ray_nodes(3) as cluster: ..."""
    spec = importlib.util.spec_from_file_location("ray_nodes", Path(__file__).with_name("ray_nodes.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules["ray_nodes"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ray_nodes
