"""Which cluster is joined."""

from __future__ import annotations

import pytest

from rlinf_lite.cluster.errors import ClusterError
from rlinf_lite.cluster.session import open_session
from rlinf_lite.cluster.watch import Watch
from rlinf_lite.config import ClusterConfig


def test_an_address_that_was_asked_for_must_answer(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ClusterError, match=r"RAY_ADDRESS=127\.0\.0\.1:1"), open_session(ClusterConfig(), Watch(0)):
        pass
