"""Resolves MODEL on the command line: a checkpoint, a run, a Hugging Face directory, or the embedded model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rlinf_lite.checkpoint import DamagedCheckpoint, Manifest, NoCheckpoint, layout
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.candidates import Candidates
from rlinf_lite.checkpoint.identify import checkpoints_directory, instead_of, is_checkpoint, located
from rlinf_lite.checkpoint.sections import check_sections
from rlinf_lite.checkpoint.storage import StoragePath, in_use
from rlinf_lite.models import hf_directory as models
from rlinf_lite.observability import log_line

WHAT = (
    f"a global_step_N directory, the directory of a run, a Hugging Face directory, or {models.EMBEDDED}tiny-arithmetic"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The model to evaluate."""

    name: str
    """For messages."""
    directory: StoragePath
    manifest: Manifest | None
    """Manifest of the checkpoint; None for a Hugging Face directory."""

    @property
    def step(self) -> int:
        """Completed steps when the weights were saved; 0 if not known."""
        return self.manifest.step if self.manifest else 0

    @property
    def section_dir(self) -> StoragePath:
        """The directory with the policy's shards in a checkpoint."""
        return self.directory / layout.ACTOR

    def fingerprint(self) -> str:
        """Identifies the weights."""
        if self.manifest is None:
            assert isinstance(self.directory, Path)
            return models.fingerprint(self.directory)
        return self.manifest.weights_fingerprint()


@contextmanager
def opened(model: str, verify: str) -> Iterator[Source]:
    """Resolve ``model``. A checkpoint is verified, and protected from deletion until the context ends.

    Args:
        verify: ``full``, ``size`` or ``off``.

    Raises:
        NoCheckpoint: there is nothing to evaluate.
        DamagedCheckpoint, UnsafeCheckpoint: the checkpoint, or each checkpoint of the run, does not verify.
        SectionMismatch: the checkpoint has no ``actor/``.
    """
    if model.startswith(models.EMBEDDED):
        yield Source(name=model, directory=models.resolve(model, "MODEL"), manifest=None)
        return
    try:
        path = located(model)
    except ValueError as error:
        raise NoCheckpoint(str(error)) from None
    if not path.is_dir():
        hint = "" if "://" in model else "; models are read from disk, so download a model of a hub first"
        raise NoCheckpoint(f"{model}: no such directory{hint}")
    if is_checkpoint(path):
        with in_use(path / layout.MANIFEST):
            yield _source(model, path, manifests.read_verified(path, verify))
    elif (path / "config.json").is_file():
        yield Source(name=model, directory=path, manifest=None)
    else:
        with _newest(model, Candidates(checkpoints_directory(path), verify)) as source:
            yield source


def _source(name: str, path: StoragePath, manifest: Manifest) -> Source:
    check_sections(path, manifest, [layout.ACTOR], whole=False)
    return Source(name=name, directory=path, manifest=manifest)


@contextmanager
def _newest(model: str, checkpoints: Candidates) -> Iterator[Source]:
    """The newest of a run's checkpoints that verifies."""
    if not checkpoints.paths:
        hint = instead_of(located(model))
        raise NoCheckpoint(
            f"{model}: neither a model nor a checkpoint is there; {f'it {hint}' if hint else f'give {WHAT}'}"
        )
    for path, manifest in checkpoints:
        for reason in checkpoints.damaged.values():
            log_line(f"!! stepped over a damaged checkpoint: {reason}")
        yield _source(str(path), path, manifest)
        return
    raise DamagedCheckpoint(f"{model}: {checkpoints.none_verifies()}")
