"""Fixtures for all unit tests."""

from __future__ import annotations

import dataclasses
import functools
import resource
import shutil
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlinf_lite.checkpoint import Checkpointer
from rlinf_lite.checkpoint import manifest as manifests


@pytest.fixture(scope="session")
def shipped_config():
    """``shipped_config(name)``: a copy of what is composed and checked once."""
    from rlinf_lite.config.compose import load

    loaded = functools.cache(lambda name: load([name]))
    return lambda name: loaded(name).model_copy(deep=True)


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


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live tensors that operations made; exact on any machine."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._seen and storage not in given:
                    self._seen.add(storage)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, num_bytes: int) -> None:
        self.now -= num_bytes


@pytest.fixture
def live_bytes():
    """``with live_bytes() as live: ... live.now, live.peak``: bytes of tensors that are made in the block."""
    return LiveBytes
