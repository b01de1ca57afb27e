"""Resume a run from ``runner.resume_dir``: choose the checkpoint, check it, restore it, and log what was done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlinf_lite import faults, fingerprints
from rlinf_lite.checkpoint import (
    CheckpointError,
    DamagedCheckpoint,
    LoadReport,
    Selection,
    StateMismatch,
    layout,
    select,
    storage,
)
from rlinf_lite.checkpoint.manifest import Manifest
from rlinf_lite.checkpoint.select import AUTO
from rlinf_lite.checkpoint.storage import StoragePath, absolute
from rlinf_lite.cluster.workers.trainer import Trainers
from rlinf_lite.config import ConfigError, RunnerConfig
from rlinf_lite.observability import log_line
from rlinf_lite.observability.hub import METRICS_FILE, HubState
from rlinf_lite.observability.jsonl import first_step, missing_steps
from rlinf_lite.recovery.converted import began_after, identity_of, log_what_is_missing, records_in, refuse_other_layout
from rlinf_lite.recovery.identity import ONE_SIDED, refuse_changes
from rlinf_lite.recovery.records import check_info
from rlinf_lite.runner.progress import Progress

_NO_CHECKPOINT = Selection(path=None, manifest=None, data={})


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Where the run begins."""

    selection: Selection
    progress: Progress
    hub_state: HubState | None = None
    changes: tuple[str, ...] = ()
    """Why the rows after this step will not equal those logged before; empty: they will. See `Origin`."""
    weights: Selection | None = None
    """A new run's model weights, where they are not the base model's."""
    automatic: bool = False
    """Whether an older checkpoint will do if this one turns out to be damaged."""

    def is_done(self, last_step: int) -> bool:
        """Whether nothing is left to do. After the last step, a validation and a row may still be missing."""
        return self.committed_step is not None and self.progress.step >= last_step and not self.progress.unlogged

    @property
    def committed_step(self) -> int | None:
        """Step of the checkpoint to resume from, or None for a new run."""
        return None if self.selection.path is None else self.progress.step

    def is_own(self, checkpoints: StoragePath) -> bool:
        """Whether the checkpoint lies in the run's own directory, so that its rows lie beside it."""
        path = self.selection.path
        return path is not None and absolute(path).parent == absolute(checkpoints)


def choose_start(
    runner: RunnerConfig, checkpoints: StoragePath, damaged: Mapping[StoragePath, str] | None = None
) -> Start:
    """Find the checkpoint that ``runner.resume_dir`` names, and read its counters.

    Hashes are checked later: in `restore`, each rank hashes what it reads.

    Args:
        checkpoints: the run's own directory.
        damaged: checkpoints that `auto` skips, with the reason, which was logged before.

    Raises:
        CheckpointError: as `checkpoint.select`; or its ``data.pt`` is not what this version writes.
        ConfigError: see `refuse_to_mix`.
    """
    wanted, verify = runner.resume_dir, runner.checkpoint.verify
    level = "size" if verify == "full" else verify
    if runner.resume_mode == "weights":
        if not layout.committed(checkpoints):
            return Start(
                selection=_NO_CHECKPOINT, progress=Progress(), weights=select(wanted, checkpoints, verify=level)
            )
        if not damaged:
            log_line(
                "runner.resume_mode=weights: this run has its own checkpoints and resumes from the newest one; "
                "runner.resume_dir is not read again"
            )
        wanted = AUTO
    known = dict(damaged or {})
    while True:
        selection = select(wanted, checkpoints, verify=level, damaged=known)
        for path, reason in selection.damaged.items():
            if path not in known:
                log_line(f"!! stepped over a damaged checkpoint: {reason}")
        try:
            start = _start(selection, checkpoints, automatic=wanted == AUTO)
            refuse_to_mix(start, checkpoints, Path(runner.logger.log_path) / METRICS_FILE)
            return start
        except DamagedCheckpoint as error:
            if wanted != AUTO:
                raise
            known = step_over(selection, error)


def step_over(selection: Selection, error: CheckpointError) -> dict[StoragePath, str]:
    """Log that the checkpoint that `auto` chose is damaged. Returns all damaged ones."""
    assert selection.path is not None
    log_line(f"!! stepped over a damaged checkpoint: {error}")
    return {**selection.damaged, selection.path: str(error)}


def _start(selection: Selection, checkpoints: StoragePath, *, automatic: bool) -> Start:
    """Raises DamagedCheckpoint: a record of the checkpoint holds what no run of this version writes."""
    path, manifest, data = selection.path, selection.manifest, selection.data
    if path is None or manifest is None:
        if automatic:
            log_line(f"runner.resume_dir=auto: no checkpoint in {checkpoints} yet, so this is a new run")
            if aside := layout.set_aside_in(checkpoints):
                names = ", ".join(found.name for found in aside)
                log_line(f"!! {checkpoints} holds {names}, set aside: to resume from one, rename it to global_step_N")
        return Start(selection=selection, progress=Progress())
    try:
        check_info(manifest.info)
    except ValueError as error:
        raise DamagedCheckpoint(f"{path / layout.MANIFEST}: {error}") from None
    try:
        progress, hub_state = records_in(manifest, data)
    except ValueError as error:
        raise DamagedCheckpoint(f"{path / layout.DATA}: {error}") from None
    if progress.step != manifest.step:
        raise DamagedCheckpoint(f"{path}: {layout.DATA} says step {progress.step}, the manifest {manifest.step}")
    start = Start(selection=selection, progress=progress, hub_state=hub_state, automatic=automatic)
    if start.is_own(checkpoints):
        return start
    of_run = f" (wandb run {hub_state['wandb_run_id']})" if hub_state["wandb_run_id"] else ""
    return replace(start, hub_state=None, changes=(f"resumed from another run's {absolute(path)}{of_run}",))


def refuse_to_mix(start: Start, checkpoints: StoragePath, metrics_file: Path) -> None:
    """Another run's checkpoint begins a history of its own, and needs a directory that holds no other one.

    Rows of later steps are no other history: such a start that was killed before its first save has left them.

    Raises:
        ConfigError: there are checkpoints, or rows of steps that this start does not make; with the remedies.
    """
    path, last = start.selection.path, start.progress.logged_step
    if path is None or start.is_own(checkpoints):
        return
    another = f"runner.resume_dir={path} is a checkpoint of another run"
    if existing := layout.committed(checkpoints):
        more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise ConfigError(
            f"{another}, but {checkpoints} already holds {existing[0].name}{more}, and two runs would be mixed there; "
            "choose another runner.experiment_name, or resume from a checkpoint of this directory "
            "(runner.resume_dir=auto: the newest)"
        )
    first = first_step(metrics_file)
    if first is not None and first <= last:
        raise ConfigError(
            f"{another}, after step {last}, but {metrics_file} holds rows from step {first} on, and two runs would be "
            "mixed there; choose another runner.experiment_name, or move that file away"
        )


def initial_weights(start: Start) -> str | None:
    """Fingerprint of the checkpoint whose weights a new run begins with; None if it begins with the base model's.

    None too for a run that has checkpoints of its own: what it began with is in their identity, and is not read again,
    so ``runner.resume_dir`` may be gone by then, or be a link that leads elsewhere.
    """
    if start.weights is None or start.weights.manifest is None:
        return None
    return start.weights.manifest.weights_fingerprint()


def check_identity(start: Start, now: Mapping[str, Any], allowed: Sequence[str]) -> Start:
    """Refuse a resume that would change the numbers; say which changes were allowed.

    Args:
        now: the identity as configured.
        allowed: ``runner.resume_allow_changes``.

    Returns:
        ``start``, with the changes that were allowed.

    Raises:
        ConfigError: what changed, key by key.
        SectionMismatch: see `refuse_other_layout`.
    """
    if start.selection.path is None or start.selection.manifest is None:
        return start
    refuse_other_layout(start.selection, now)
    saved = identity_of(start.selection.manifest, now)
    changes = refuse_changes(saved, now, allowed, start.selection.path.name)
    for change in changes:
        log_line(f"!! allowed by runner.resume_allow_changes, numbers will differ: {change}")
    return replace(start, changes=(*start.changes, *changes))


def recipe(made_of: Mapping[str, Any], num_ranks: Mapping[str, int], compute: str) -> str:
    """`Origin.recipe`: a digest of an identity, of what the workers compute on and, where it counts, of how many ranks
    each section has."""
    made_with = {key: value for key, value in made_of.items() if key not in ONE_SIDED}
    counted = {} if _any_ranks_are_exact(made_of) else dict(num_ranks)
    return fingerprints.of_value([made_with, counted, compute])[:16]


def _any_ranks_are_exact(made_of: Mapping[str, Any]) -> bool:
    """Whether the trainers of a run with this identity compute bit-exactly on any number of ranks."""
    strategies = [made_of.get(f"{section}.fsdp_config.strategy", "fsdp2") for section in ("actor", "critic")]
    return str(made_of.get("actor.training_backend", "fsdp")) == "fsdp" and "fsdp" not in strategies


def saved_identity(start: Start) -> Mapping[str, Any]:
    """The identity in the checkpoint to resume from; empty for a new run."""
    manifest = start.selection.manifest
    return {} if manifest is None else manifest.info.get("identity", {})


def sweep(checkpoints: StoragePath) -> None:
    """Remove incomplete saves. Called late in a start, so that workers of a killed run have ended."""
    try:
        swept = layout.sweep(checkpoints)
    except OSError as error:
        log_line(f"!! leftovers of a killed save stay in {checkpoints} for now: {error.strerror} ({error.filename})")
        return
    if swept:
        log_line(f"removed {len(swept)} unfinished save(s) of a killed run: {', '.join(path.name for path in swept)}")


def restore(
    start: Start,
    trainers: Trainers,
    runner: RunnerConfig,
    checkpoints: StoragePath,
    now: Mapping[str, Any],
    compute: str,
    others: Mapping[StoragePath, str] | None = None,
) -> Start:
    """Load the chosen checkpoint into the actors, and log what will not be bit-exact.

    Args:
        now: the identity as configured.
        compute: what the workers compute on.
        others: checkpoints that `auto` skips, with the reason.

    Returns:
        The checkpoint that was loaded: with ``resume_dir=auto``, one that the ranks find damaged is skipped.

    Raises:
        CheckpointError: the given checkpoint does not verify, or none does.
        ConfigError: an older one that verifies would not give the same numbers.
    """
    if start.weights is not None:
        _load_weights(start.weights, trainers, runner.checkpoint.verify)
    while (path := start.selection.path) is not None:
        try:
            report = trainers.load(str(absolute(path)), runner.checkpoint.verify)
        except (DamagedCheckpoint, StateMismatch) as error:
            # Its identity matches, so a state of another form means that its content does not match its manifest.
            allowed = isinstance(error, StateMismatch) and bool(runner.resume_allow_changes)
            if not start.automatic or allowed:
                raise
            known = {**(others or {}), **step_over(start.selection, error)}
            start = choose_start(runner, checkpoints, known)
            start = check_identity(start, now, runner.resume_allow_changes)
        else:
            _log_restored(report, trainers.layout.sizes, compute)
            changes = (*start.changes, *what_differs(report, trainers.layout.sizes, compute))
            return replace(start, changes=tuple(dict.fromkeys(changes)))
    return start


def _load_weights(weights: Selection, trainers: Trainers, verify: str) -> None:
    path, manifest = weights.path, weights.manifest
    assert path is not None and manifest is not None
    report = trainers.load_weights(str(absolute(path)), verify)
    log_line(f"a new run, with the model weights of step {manifest.step} of {path} ({report.load_seconds:.2f} s)")


def _log_restored(report: LoadReport, num_ranks: Mapping[str, int], compute: str) -> None:
    path, manifest = report.path, report.manifest
    log_line(
        f"resumed from {path.name} ({path}, {report.load_seconds:.2f} s); continuing with step {manifest.step + 1}"
    )
    log_what_differs(report, num_ranks, compute)


def what_differs(report: LoadReport, num_ranks: Mapping[str, int], compute: str) -> list[str]:
    """Short reasons why later numbers will differ from an uninterrupted run's; empty if they will not.

    Args:
        num_ranks: of each section.
    """
    saved_compute = report.manifest.info.get("compute")
    device = [f"devices: {saved_compute} -> {compute}"] if saved_compute != compute else []
    if _any_ranks_are_exact(report.manifest.info.get("identity", {})):
        return device
    saved = saved_ranks(report.manifest)
    ranks = [
        f"{name} ranks: {saved.get(name, 0)} -> {num_ranks.get(name, 0)}"
        for name in {**saved, **num_ranks}
        if saved.get(name) != num_ranks.get(name)
    ]
    rng = ["RNG state not restored"] if not (report.rng_restored or ranks or device) else []
    return ranks + device + rng


def saved_ranks(manifest: Manifest) -> dict[str, int]:
    """How many ranks wrote each section."""
    return {name: len(ranks) for name, ranks in manifest.ranks_of().items()}


def log_what_differs(report: LoadReport, num_ranks: Mapping[str, int], compute: str) -> None:
    """The same in full, for the log."""
    manifest, saved = report.manifest, saved_ranks(report.manifest)
    missing = log_what_is_missing(manifest)
    exact = _any_ranks_are_exact(manifest.info.get("identity", {}))
    if saved != num_ranks:
        before = ", ".join(f"{number} {name} ranks" for name, number in saved.items())
        after = ", ".join(f"{number}" for number in num_ranks.values())
        if exact:
            log_line(f"saved by {before}, now {after}: the numbers stay bit-equal")
        else:
            log_line(
                f"!! saved by {before}, now {after}: weights, optimizer state, data "
                "order and sampling seeds are the same; sums are taken in another order, and each rank's RNG state is "
                "derived from (seed, step, rank)"
            )
    elif not (exact or report.rng_restored or missing):
        log_line("!! saved with another device, tensor or sequence parallelism: RNG derives from (seed, step, rank)")
    if manifest.info.get("compute") != compute:
        log_line(
            f"!! saved on {manifest.info.get('compute')}, now {compute}: other kernels round differently, so "
            "numbers will not be bit-equal"
        )


def set_newer_aside(start: Start, checkpoints: StoragePath) -> None:
    """Rename the checkpoints that are newer than the one to resume from.

    Call it before rows of later steps are dropped, because `auto` must not choose these checkpoints afterwards: after a
    rollback they belong to abandoned steps, and a damaged one may verify next time. The newest is renamed first: after
    a kill `auto` then chooses the newest one that is left, whose rows are all there.
    """
    path, step = start.selection.path, start.progress.step
    for newer in layout.committed(checkpoints):
        number = layout.step_of(newer) or 0
        if number <= step or (path is not None and absolute(newer) == absolute(path)):
            continue
        faults.reach("resume.aside", step=number)
        damaged = newer in start.selection.damaged
        aside = layout.set_aside(newer, layout.DAMAGED if damaged else layout.SUPERSEDED)
        storage.sync_dir(checkpoints)
        begins = f"step {step}" if step else "the beginning"
        what = "did not verify" if damaged else f"is newer than {begins}, from which this run resumes"
        log_line(
            f"!! {newer.name} {what}; it is now {aside.name} (nothing reads it; remove it with "
            "python -m rlinf_lite.checkpoint prune)"
        )


def log_missing_rows(start: Start, metrics_file: Path, checkpoints: StoragePath) -> None:
    """Log which rows before the resumed step are missing in ``metrics.jsonl``, and how to get them.

    The run continues: its later numbers are right, and the rows may be stored elsewhere. Rows before the first step of
    the run do not count as missing: it may have started from another run's checkpoint.
    """
    last = start.progress.logged_step
    if start.committed_step is None or last <= 0 or not start.is_own(checkpoints):
        return
    manifest = start.selection.manifest
    began = 0 if manifest is None else began_after(manifest)
    if not (missing := [step for step in missing_steps(metrics_file, last) if step > began]):
        return
    first = missing[0]
    older = [path.name for path in layout.committed(checkpoints) if (layout.step_of(path) or 0) < first]
    again = f"runner.resume_dir={checkpoints / older[0]}" if older else "a new run under another runner.experiment_name"
    log_line(
        f"!! {metrics_file}: the rows of {_ranges(missing)} are missing or repeated, but the run continues after "
        f"step {last}. They were removed or are in another file, and are not written again. To get them: {again}"
    )


def _ranges(steps: Sequence[int]) -> str:
    """``steps 3-5, 8``, of rising numbers."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and parts[-1][-1] == step - 1:
            parts[-1][1:] = [step]
        else:
            parts.append([step])
    return f"step{'s' * (len(steps) > 1)} " + ", ".join("-".join(map(str, part)) for part in parts)
