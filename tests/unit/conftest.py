"""Fixtures for all unit tests."""

from __future__ import annotations

import resource
from contextlib import contextmanager

import pytest


@pytest.fixture
def largest_file():
    """Limit the size of files that this process writes: the kernel then fails a write, as a full disk does."""

    @contextmanager
    def limit(num_bytes):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit
