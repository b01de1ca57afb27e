"""Resuming from what a converter wrote: another layout is refused, and what a checkpoint lacks is logged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlinf_lite.checkpoint import Selection, layout
from rlinf_lite.checkpoint.identify import other_layout
from rlinf_lite.checkpoint.manifest import LACKS_RNG, WRITTEN_BY, Manifest
from rlinf_lite.observability import log_line
from rlinf_lite.observability.hub import HubState
from rlinf_lite.recovery.records import BEGAN_AFTER, records_of
from rlinf_lite.runner.progress import Progress

_BACKEND = "actor.training_backend"
ANOTHER_PROGRAM = "checkpoint (written by)"
"""What ``runner.resume_allow_changes`` names to resume from a converted checkpoint of another program."""


def refuse_other_layout(selection: Selection, now: Mapping[str, Any]) -> None:
    """
    Args:
        now: the identity as configured.

    Raises:
        SectionMismatch: the backend that is configured keeps its state in another layout; names the converter.
    """
    path, manifest = selection.path, selection.manifest
    if path is None or manifest is None or layout.ACTOR not in manifest.ranks_of():
        return
    wants_files = now.get(_BACKEND) == "megatron"
    if manifest.has_shards() == wants_files:
        raise other_layout(path / layout.ACTOR, wants_files=wants_files)


def identity_of(manifest: Manifest, now: Mapping[str, Any]) -> Mapping[str, Any]:
    """The identity in a checkpoint. Another program's has none: then one line stands for all that is not known of it.

    Args:
        now: the identity as configured.
    """
    program = manifest.info.get(WRITTEN_BY)
    if program is None:
        identity: Mapping[str, Any] = manifest.info.get("identity", {})
        return identity
    return {**now, ANOTHER_PROGRAM: f"{program}, whose config, data cursor and RNG states are not known"}


def records_in(manifest: Manifest, data: Mapping[str, Any]) -> tuple[Progress, HubState]:
    """The driver's records in a checkpoint; of another program's only the step is known. Raises as `records_of`."""
    if WRITTEN_BY in manifest.info:
        return Progress(step=manifest.step), HubState(wandb_run_id=None, last_step=manifest.step)
    return records_of(data)


def began_after(manifest: Manifest) -> int:
    """The step that the rows of the run begin after."""
    default = manifest.step if WRITTEN_BY in manifest.info else 0
    began: int = manifest.info.get(BEGAN_AFTER, default)
    return began


def log_what_is_missing(manifest: Manifest) -> bool:
    """Log what a converted checkpoint lacks; returns whether it lacks anything."""
    if not manifest.info.get(LACKS_RNG):
        return False
    log_line("!! a converted checkpoint has no RNG state: each rank's is derived from (seed, step, rank)")
    if (program := manifest.info.get(WRITTEN_BY)) is not None:
        log_line(
            f"!! {program} wrote it: data and counters of samples and tokens begin anew, after step {manifest.step}"
        )
    return True
