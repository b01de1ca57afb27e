"""Fixtures for all unit tests."""

from __future__ import annotations

import dataclasses
import resource
import shutil
from contextlib import contextmanager

import pytest

from rlinf_lite.checkpoint import Checkpointer
from rlinf_lite.checkpoint import manifest as manifests


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


@pytest.fixture
def add_critic(tmp_path_factory):
    """``add_critic(path, state)``: add the section critic/, as one rank would have written it beside one of actor/."""

    def add(path, state):
        alone = Checkpointer(tmp_path_factory.mktemp("critic"), section="critic").save(0, state).path
        shutil.copytree(alone / "critic", path / "critic")
        manifest, critic = manifests.read(path), manifests.read(alone)
        files = {**manifest.files, **{name: record for name, record in critic.files.items() if "critic/" in name}}
        changed = dataclasses.replace(manifest, files=files, sections={"actor": [0], "critic": [1]})
        (path / "manifest.json").write_text(changed.to_json())
        return path

    return add
