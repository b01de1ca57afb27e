"""Build a `Runner` from a config and running workers, and rebuild it at its last completed step after a failure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlinf_lite import faults, readable
from rlinf_lite.algorithms import Algorithm, build_algorithm
from rlinf_lite.checkpoint import CheckpointError, RankSilent, layout
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.select import AUTO
from rlinf_lite.checkpoint.storage import StoragePath, absolute
from rlinf_lite.cluster.replicas import MemoryReplicas
from rlinf_lite.cluster.workers.records import TrainerSetup
from rlinf_lite.config import Config, flatten, to_yaml
from rlinf_lite.data import PromptStream
from rlinf_lite.durable import replace_text
from rlinf_lite.observability import JsonlSink, MetricHub, Origin, build_hub, events, log_line
from rlinf_lite.observability.hub import METRICS_FILE
from rlinf_lite.recovery.converted import began_after
from rlinf_lite.recovery.identity import carried_on
from rlinf_lite.recovery.logprobs import about_megatron, engine_is_exact, old_from_engine
from rlinf_lite.recovery.prepare import Prepared
from rlinf_lite.recovery.records import BEGAN_AFTER, model_paths
from rlinf_lite.recovery.resume import (
    Start,
    choose_start,
    log_missing_rows,
    log_what_differs,
    recipe,
    restore,
    saved_identity,
    set_newer_aside,
    sweep,
    what_differs,
)
from rlinf_lite.recovery.workers import Workers
from rlinf_lite.rollout.batches import rows_per_batch
from rlinf_lite.runner.generation import Generation, Validation
from rlinf_lite.runner.interruption import Interruption
from rlinf_lite.runner.loop import Runner
from rlinf_lite.runner.models import Models
from rlinf_lite.runner.policies import SaveRequest, policies
from rlinf_lite.runner.progress import Progress
from rlinf_lite.runner.sampling import StepSource
from rlinf_lite.runner.saving import Saver
from rlinf_lite.runner.self_check import SelfCheck
from rlinf_lite.stopwatch import Stopwatch
from rlinf_lite.training.batch import SplitSettings
from rlinf_lite.types import Column, Sampling

_FROM_STEP = re.compile(r"config\.from_step_([0-9]+)\.yaml")


@dataclass(kw_only=True)
class Build:
    """What a run is made from; all of it outlives the workers."""

    config: Config
    prepared: Prepared
    checkpoints: StoragePath
    log: Path
    stop: Interruption
    request: SaveRequest
    started: float
    """When the driver's process began, by ``time.monotonic``."""
    startup: Stopwatch = field(default_factory=Stopwatch)
    """Runs since the driver's process began, until its first step is completed."""

    def __post_init__(self) -> None:
        self._began_from, self._compute, self._recipe = self.prepared.start, "", ""
        self.events = events.EventLog(self.log / events.EVENTS_FILE)

    @property
    def first_step(self) -> int:
        """Steps that are completed when the run begins."""
        return self.prepared.start.progress.step

    def bring_up(self, workers: Workers) -> tuple[TrainerSetup, str]:
        """Build models in all workers. Raises as `Workers.set_up`."""
        with workers.session.watch.starting(self.config.cluster.start_timeout):
            return workers.set_up(str(absolute(self.checkpoints)), self.prepared.total_updates)

    def bring_up_again(self, workers: Workers, runner: Runner) -> None:
        """Models in trainers that were reset or replaced. Raises as `Workers.set_up`."""
        _, compute = self.bring_up(workers)
        if compute != self._compute:
            log_line(f"!! the run was on {self._compute}, now {compute}: numbers will not be bit-equal")
            self._compute, runner.saver.info = compute, {**runner.saver.info, "compute": compute}

    def runner(self, workers: Workers, sinks: ExitStack, between_steps: Callable[[], None]) -> Runner:
        """Workers, checkpoint, sinks: everything is ready when this returns.

        Args:
            sinks: closes what the run writes to.
            between_steps: for the `Runner`.
        """
        config, prepared = self.config, self.prepared
        built, self._compute = self.bring_up(workers)
        self.startup.lap("workers")
        size = f"{readable.count(built.num_parameters)} parameters"
        log_line(f"model: {config.actor.model.model_path}, {size}, {_ranks(workers)}")
        if (line := about_megatron(config)) is not None:
            log_line(line)
        start = self._restore_from(prepared.start, workers)
        self.startup.lap("restore")
        self._recipe = recipe(prepared.identity, workers.trainers.layout.sizes, self._compute)
        hub, samples = self._begin_on_disk(start, sinks)
        info = self._info(start, {"tied": built.tied, **model_paths(config)})
        info |= {"identity": carried_on(saved_identity(start), prepared.identity), "compute": self._compute}
        generation = Generation(
            rollouts=workers.rollouts,
            rewards=workers.rewards,
            enable_sleep=config.rollout.enable_sleep,
            max_failed_fraction=config.reward.max_failed_fraction,
        )
        algorithm = build_algorithm(config.algorithm)
        runner = Runner(
            source=self._source(generation, algorithm),
            algorithm=algorithm,
            models=self._models(workers, algorithm),
            trainers=workers.trainers,
            generation=generation,
            weights=workers.weight_sync(),
            self_check=SelfCheck(config, workers.rollouts, workers.trainers, self.events.add),
            replicas=MemoryReplicas(workers.trainers, workers.session)
            if config.runner.checkpoint.memory_replicas
            else None,
            validation=self._validation(),
            hub=hub,
            samples=samples,
            log_rollouts=config.runner.logger.log_rollouts,
            progress=start.progress,
            last_step=prepared.last_step,
            saver=self._saver(workers, start, info),
            stop=self.stop,
            between_steps=between_steps,
        )
        runner.saver.flush = runner.flush
        self._began_from = replace(start, progress=deepcopy(start.progress))
        return runner

    def _source(self, generation: Generation, algorithm: Algorithm) -> StepSource:
        config, settings = self.config, self.config.algorithm
        problems = self.prepared.train.problems
        return StepSource(
            generation=generation,
            stream=PromptStream(problems, seed=config.data.seed, shuffle=config.data.shuffle),
            algorithm=algorithm,
            num_groups=config.data.rollout_batch_size,
            max_rounds=settings.max_sampling_rounds if settings.dynamic_sampling else 1,
            group_size=settings.group_size,
            sampling=Sampling(**vars(settings.sampling_params)),
            max_rows=rows_per_batch(
                config.rollout,
                num_prompts=config.data.rollout_batch_size,
                group_size=settings.group_size,
                num_workers=generation.rollouts.size,
            ),
            seed=config.actor.seed,
            split=SplitSettings.of(settings, config.runner, seed=config.actor.seed),
        )

    def _models(self, workers: Workers, algorithm: Algorithm) -> Models:
        config = self.config
        device = workers.session.device
        needs, from_engine = set(algorithm.needs), old_from_engine(config, device)
        if config.rollout.return_logprobs or from_engine:
            needs.add(Column.ENGINE_LOGPROB)
        if config.algorithm.n_minibatches > 1:
            needs.add(Column.OLD_LOGPROB)
        return Models(
            policy=workers.trainers.policy,
            critic=workers.trainers.critic,
            needs=frozenset(needs),
            old_from_engine=from_engine,
            engine_is_exact=engine_is_exact(config, device),
            critic_warmup_steps=config.algorithm.critic_warmup_steps,
        )

    def _validation(self) -> Validation:
        config, problems = self.config, self.prepared.val
        return Validation(
            problems=problems.problems if problems else (),
            interval=config.runner.val_check_interval,
            data=config.data,
            rollout=config.rollout,
            sampling=config.algorithm.val_sampling_params,
            seed=config.actor.seed,
        )

    def _info(self, start: Start, facts: Mapping[str, Any]) -> dict[str, Any]:
        """For each manifest: ``facts``, and where the run's rows begin."""
        own = start.selection.manifest if start.is_own(self.checkpoints) else None
        began = start.progress.logged_step if own is None else began_after(own)
        return {**facts, BEGAN_AFTER: began}

    def _begin_on_disk(self, start: Start, sinks: ExitStack) -> tuple[MetricHub, JsonlSink | None]:
        """Everything that a start changes on the disk; nothing if there is nothing to do.

        In such an order that a kill after any of the changes leaves what the next start repairs: no row is dropped
        while a checkpoint that counts on it could be chosen.
        """
        config, last_step, step = self.config, self.prepared.last_step, start.progress.step
        if start.is_done(last_step):
            return MetricHub([], committed_step=step), None
        faults.reach("resume.sweep", step=step)
        sweep(self.checkpoints)
        set_newer_aside(start, self.checkpoints)
        faults.reach("resume.config", step=step)
        save_config(config, self.log, start)
        faults.reach("resume.event", step=step)
        path = start.selection.path
        self.events.add(events.START if path is None else events.RESUME, step, str(path or ""))
        opened = open_sinks(config, self.log, start, last_step, sinks, made_with=self._recipe)
        log_missing_rows(start, self.log / METRICS_FILE, self.checkpoints)
        faults.reach("resume.ready", step=step)
        return opened

    def _saver(self, workers: Workers, start: Start, info: dict[str, Any]) -> Saver:
        return Saver(
            trainers=workers.trainers,
            policies=policies(self.config.runner),
            checkpoint=self.config.runner.checkpoint,
            progress=start.progress,
            saved=self._saved_in(start),
            last_step=self.prepared.last_step,
            info=info,
            flush=lambda: None,
            started=self.started,
            request=self.request,
            record=self.events.add,
            is_committed=self.is_committed,
        )

    def _saved_in(self, start: Start) -> int | None:
        """For `Saver.saved`: a new run has nothing to save yet; another run's checkpoint is not in this directory."""
        path, step = start.selection.path, start.progress.step
        if path is None:
            return step if step == 0 else None  # later than 0: from memory
        return step if start.is_own(self.checkpoints) and layout.step_of(path) == step else None

    def is_committed(self, step: int, save_id: str) -> bool:
        """Whether the checkpoint of ``step`` is the one that the save ``save_id`` wrote."""
        try:
            manifest = manifests.read(layout.step_dir(self.checkpoints, step))
        except CheckpointError:
            return False
        return manifest.info.get(manifests.SAVE_ID) == save_id

    def _restore_from(self, start: Start, workers: Workers) -> Start:
        return restore(
            start, workers.trainers, self.config.runner, self.checkpoints, self.prepared.identity, self._compute
        )

    def restore(self, runner: Runner, workers: Workers, sinks: ExitStack) -> None:
        """The newest completed step's state for workers that were replaced: from memory, else from the newest
        checkpoint, else from the beginning. What was logged of later steps is dropped: they come again.
        """
        sweep(self.checkpoints)  # a rank that died in a save could not: and nobody else saves now
        before, self._recipe = (
            self._recipe,
            recipe(self.prepared.identity, workers.trainers.layout.sizes, self._compute),
        )
        held = None if runner.replicas is None else runner.replicas.step
        if runner.replicas is not None and (found := runner.replicas.restore()) is not None:
            report, data = found
            log_line(f"   the state of step {report.manifest.step} was in memory ({report.load_seconds:.2f} s)")
            log_what_differs(report, workers.trainers.layout.sizes, self._compute)
            start = replace(
                self._began_from,
                progress=Progress.from_state(data["progress"]),
                hub_state=data["observability"],
                changes=tuple(what_differs(report, workers.trainers.layout.sizes, self._compute)),
            )
            self._log_from(start, runner, sinks, same_recipe=self._recipe == before)
            return
        if held is not None:
            log_line(f"!! the state of step {held} in memory is damaged or gone: it is not used")
            self._empty(workers, runner)  # a rank may still wait in that load for one whose part is gone
        start = self._restore_from_newest(runner, workers)
        if start.selection.path is None:
            log_line("!! no checkpoint to resume from: the run begins again")
        self._log_from(start, runner, sinks, same_recipe=self._recipe == before)

    def _log_from(self, start: Start, runner: Runner, sinks: ExitStack, *, same_recipe: bool) -> None:
        """Set progress and sinks to ``start``, if they are not there already."""
        if start.progress.step != runner.progress.step:
            self._go_back(runner, start)
        elif same_recipe:
            return
        hub_state = start.hub_state or {"wandb_run_id": None, "last_step": 0}
        if hub_state["wandb_run_id"] is None:
            hub_state = runner.hub.state()
        sinks.close()
        runner.hub, runner.samples = open_sinks(
            self.config,
            self.log,
            replace(start, progress=runner.progress, hub_state=hub_state),
            self.prepared.last_step,
            sinks,
            again=True,
            made_with=self._recipe,
        )

    def saved_by(self, step: int) -> set[StoragePath]:
        """The checkpoints that this run has made itself until ``step``; others in the directory are of other runs."""
        first = self._began_from.progress.step
        return {path for path in layout.committed(self.checkpoints) if first < (layout.step_of(path) or 0) <= step}

    def _restore_from_newest(self, runner: Runner, workers: Workers) -> Start:
        saved = self.saved_by(runner.progress.step)
        others = {path: "not of this run" for path in {*layout.committed(self.checkpoints)} - saved}
        settings = self.config.runner.model_copy(update={"resume_dir": AUTO, "resume_mode": "full"})
        if saved:
            try:
                start = choose_start(settings, self.checkpoints, others)
                return restore(
                    start, workers.trainers, settings, self.checkpoints, self.prepared.identity, self._compute, others
                )
            except RankSilent:
                raise  # its rank was lost: the checkpoint may be good
            except CheckpointError as error:
                log_line(f"!! {error}")
        start = replace(self._began_from, progress=deepcopy(self._began_from.progress))
        if saved and start.selection.path is None:
            # Nothing that follows would overwrite optimizer state, counters and RNG state, nor base weights.
            self._empty(workers, runner)
        return self._restore_from(start, workers)

    def _empty(self, workers: Workers, runner: Runner) -> None:
        """Build the trainers' models again."""
        workers.reset_trainers()
        self.bring_up_again(workers, runner)

    def _go_back(self, runner: Runner, start: Start) -> None:
        lost = runner.progress.step - start.progress.step
        log_line(f"   {lost} completed step(s) are done again: from step {start.progress.step + 1}")
        set_newer_aside(start, self.checkpoints)
        faults.reach("resume.event", step=start.progress.step)
        self.events.add(events.BACK, start.progress.step, f"{lost} completed step(s) are done again")
        runner.progress.become(start.progress)
        runner.saver.went_back(self._saved_in(start))


def open_sinks(
    config: Config,
    log: Path,
    start: Start,
    last_step: int,
    sinks: ExitStack,
    *,
    made_with: str,
    again: bool = False,
) -> tuple[MetricHub, JsonlSink | None]:
    """Open the hub and the rollout rows, both truncated to the committed step. They close with ``sinks``.

    Args:
        made_with: `recipe` of the rows to come.
        again: whether this run has written to them before: its files are then truncated, even to nothing, not renamed.
    """
    logger, progress = config.runner.logger, start.progress
    new = start.committed_step is None and not again
    rollouts = log / "rollouts.jsonl"
    faults.reach("resume.rollouts", step=progress.step)
    samples = JsonlSink(rollouts, committed_step=None if new else progress.step) if logger.log_rollouts else None
    if samples:
        sinks.callback(samples.close)
    hub = build_hub(
        logger,
        committed_step=None if new else progress.logged_step,
        config_dict=flatten(config),
        num_steps=last_step,
        state=start.hub_state,
        origin=Origin(recipe=made_with, changes=start.changes),
    )
    sinks.callback(hub.close)
    return hub, samples


def save_config(config: Config, log: Path, start: Start) -> None:
    """The resolved config, as YAML that can be run again. A resume keeps the first and adds its own."""
    step = start.committed_step
    for path in log.glob("config.from_step_*.yaml"):  # of a future that is given up: a reader takes the latest one
        if (match := _FROM_STEP.fullmatch(path.name)) and int(match[1]) > start.progress.step:
            path.replace(path.with_suffix(".superseded.yaml"))
    name = "config.yaml" if step is None else f"config.from_step_{step}.yaml"
    replace_text(log / name, to_yaml(config), durable=False)


def _ranks(workers: Workers) -> str:
    """``"2 actor ranks, 1 critic ranks"``."""
    sizes = workers.trainers.layout.sizes
    return ", ".join(f"{size} {section} ranks" for section, size in sizes.items())
