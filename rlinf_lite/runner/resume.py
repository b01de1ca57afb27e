"""From ``resume_dir`` to a run that goes on: what is chosen, what is refused, what is restored, and saying so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlinf_lite.checkpoint import DamagedCheckpoint, LoadReport, Selection, layout, read_data, select
from rlinf_lite.cluster.group import WorkerGroup
from rlinf_lite.config import Config
from rlinf_lite.observability import say
from rlinf_lite.observability.hub import HubState
from rlinf_lite.runner.identity import refuse_changes
from rlinf_lite.runner.progress import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Where the run begins."""

    selection: Selection
    progress: Progress
    hub_state: HubState | None

    @property
    def committed_step(self) -> int | None:
        """Step of the checkpoint that the run goes on from; None: a new run."""
        return None if self.selection.path is None else self.progress.step


def choose_start(config: Config, checkpoints: Path) -> Start:
    """Select and verify the checkpoint that ``runner.resume_dir`` asks for, and read its counters.

    Raises:
        CheckpointError: as `checkpoint.select`; or its ``data.pt`` is not what this version writes.
    """
    selection = select(config.runner.resume_dir, checkpoints, verify=config.runner.checkpoint.verify)
    for reason in selection.skipped:
        say(f"!! stepped over a damaged checkpoint: {reason}")
    if selection.path is None or selection.manifest is None:
        if config.runner.resume_dir is not None:
            say(f"runner.resume_dir=auto: no checkpoint in {checkpoints} yet, so this is a new run")
        return Start(selection=selection, progress=Progress(), hub_state=None)
    data = read_data(selection.path)
    try:
        progress, hub_state = Progress.from_state(data["progress"]), data["observability"]
    except (KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{selection.path / layout.DATA}: {error}; it was written by another version") from None
    if progress.step != selection.manifest.step:
        raise DamagedCheckpoint(
            f"{selection.path}: {layout.DATA} says step {progress.step}, the manifest {selection.manifest.step}"
        )
    elsewhere = selection.path.resolve().parent != checkpoints.resolve()
    return Start(selection=selection, progress=progress, hub_state=None if elsewhere else hub_state)


def check_identity(start: Start, now: Mapping[str, Any], config: Config) -> Start:
    """Refuse a resume that would change the numbers; say which changes were allowed.

    Returns:
        ``start``; with allowed changes it is another run to wandb, whose rows cannot be withdrawn.

    Raises:
        ConfigError: what changed, key by key.
    """
    if start.selection.manifest is None or start.selection.path is None:
        return start
    saved = start.selection.manifest.info.get("identity", {})
    changes = refuse_changes(saved, now, config.runner.resume_allow_changes, start.selection.path.name)
    for change in changes:
        say(f"!! allowed by runner.resume_allow_changes, numbers will differ: {change}")
    return replace(start, hub_state=None) if changes else start


def sweep(checkpoints: Path) -> None:
    """Remove what killed saves left aside; late in a start, when workers of the killed run have had time to end."""
    try:
        swept = layout.sweep(checkpoints)
    except OSError as error:
        say(f"!! leftovers of a killed save stay in {checkpoints} for now: {error.strerror} ({error.filename})")
        return
    if swept:
        say(f"removed {len(swept)} unfinished save(s) of a killed run: {', '.join(path.name for path in swept)}")


def restore(start: Start, actors: WorkerGroup, compute: str) -> None:
    """Load the chosen checkpoint into the actors, and say what is exact and what is not."""
    path, manifest = start.selection.path, start.selection.manifest
    if path is None or manifest is None:
        return
    # The driver has verified the files moments ago; ranks need not read everything a second time.
    report: LoadReport = actors.call("load", str(path.resolve()), "off")[0]
    say(f"resumed from {path.name} ({path}, {report.load_seconds:.2f} s); going on with step {manifest.step + 1}")
    if not report.rng_restored and manifest.world_size == actors.size:
        say("!! saved on another kind of device: each rank's generators start anew from (seed, step, rank)")
    elif not report.rng_restored:
        say(
            f"!! saved by {manifest.world_size} actor ranks, now {actors.size}: weights, moments, data order and "
            "sampling noise are the same; sums are taken in another order, and each rank's generators start anew from "
            "(seed, step, rank)"
        )
    if manifest.info.get("compute") != compute:
        say(
            f"!! saved on {manifest.info.get('compute')}, now {compute}: other kernels round differently, so "
            "numbers will not be bit-equal"
        )


def supersede_newer(start: Start, checkpoints: Path) -> None:
    """Going back to an older checkpoint starts another future: what the old one left must not be picked by ``auto``.

    Done last, when the run is about to take its first step: a start that fails must leave everything where it is.
    """
    path, step = start.selection.path, start.progress.step
    if path is None:
        return
    for newer in layout.committed(checkpoints):
        if (layout.step_of(newer) or 0) > step and newer.resolve() != path.resolve():
            aside = layout.set_aside(newer)
            say(
                f"!! {newer.name} is newer than {path.name}, from which this run goes on; it is now {aside.name} "
                "(resume_dir=auto goes on from the newest)"
            )
