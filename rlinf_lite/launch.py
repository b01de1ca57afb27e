"""One run, from its config to its exit code: directories, signals, cluster, workers and the supervised loop."""

from __future__ import annotations

import os
import sys
import threading
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlinf_lite import numerics
from rlinf_lite.cluster import own_ray
from rlinf_lite.cluster.errors import NodeLost, RayLost
from rlinf_lite.cluster.guard import guard
from rlinf_lite.cluster.joining import REJOIN_VARIABLE
from rlinf_lite.cluster.nodes import dead, draining
from rlinf_lite.cluster.session import Session, open_session
from rlinf_lite.cluster.watch import Watch
from rlinf_lite.config import Config, ConfigError
from rlinf_lite.errors import EXIT_OUT_OF_TIME
from rlinf_lite.observability import log_line
from rlinf_lite.recovery.lock import hold
from rlinf_lite.recovery.restarts import BUDGET_VARIABLE, RestartBudget, budget_for
from rlinf_lite.recovery.workers import Workers
from rlinf_lite.runner.interruption import Interrupted, Interruption, on_signals
from rlinf_lite.runner.policies import SaveRequest, save_requests
from rlinf_lite.runner.signals import become

if TYPE_CHECKING:
    from rlinf_lite.checkpoint.storage import StoragePath
    from rlinf_lite.recovery.prepare import Prepared
    from rlinf_lite.recovery.supervisor import Supervisor
    from rlinf_lite.runner.loop import Runner


_STARTED_VARIABLE = "RLINF_LITE_STARTED"
"""Environment variable: a driver that starts itself anew hands on when it began, for ``runner.max_time``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Directories:
    run: Path
    log: Path
    checkpoints: StoragePath
    made: tuple[Path, ...] = ()
    """Directories that were not there before, outermost first."""

    @property
    def owned(self) -> list[Path]:
        """What no other driver may use meanwhile; the lock of a checkpoints directory within the run's is enough."""
        apart = [] if self.checkpoints.parent == self.run else [self.run]
        return [*([self.checkpoints] if isinstance(self.checkpoints, Path) else []), *apart]


def launch(config: Config, *, started: float) -> int:
    """Run ``config`` to its end.

    Args:
        started: when the process began, by ``time.monotonic()``.

    Returns:
        The exit code: 0; 1 if the last checkpoint is not on the disk; that of the signal or deadline that stopped it.
    """
    started = float(os.environ.pop(_STARTED_VARIABLE, started))
    directories = make_directories(config)
    stop = Interruption(config.runner.preemption_grace)
    budget = budget_for(config.runner.max_restarts, config.runner.restart_window)
    log_line(f"run: {config.runner.experiment_name}, in {directories.log}; starting ...")
    if not config.cluster.deterministic:
        log_line(f"!! {numerics.OPTED_OUT}")
    with ExitStack() as stack:
        given_up = threading.Event()  # the thread that prepares may be reading a large data set
        stack.callback(given_up.set)
        stack.callback(_remove_empty, directories.made)
        for directory in directories.owned:
            stack.enter_context(hold(directory))
        request = stack.enter_context(save_requests())
        stack.enter_context(on_signals(stop))
        driver = _Driver(
            config=config,
            directories=directories,
            stop=stop,
            budget=budget,
            request=request,
            started=started,
            stack=stack,
            given_up=given_up,
        )
        try:
            return _last_words(driver.train(), directories, saved=driver.has_saved)
        except Interrupted as interrupted:
            return driver.stopped(interrupted)
        except RayLost as lost:
            if stop.reason is None:
                driver.start_anew(lost)
            return driver.stopped(Interrupted(stop.reason or str(lost), stop.code))


@dataclass(kw_only=True)
class _Driver:
    """One life of this process's program: it ends with the run, or with the Ray that it is connected to."""

    config: Config
    directories: Directories
    stop: Interruption
    budget: RestartBudget
    request: SaveRequest
    started: float
    stack: ExitStack
    given_up: threading.Event
    session: Session | None = None
    supervisor: Supervisor | None = None

    def train(self) -> Runner:
        """Ray, workers, and the supervised run. Raises as `Supervisor.run`."""
        with self.stop.immediate():
            # Ray takes seconds to start, and so do torch's import and the data: side by side.
            background = ThreadPoolExecutor(1)
            preparing = background.submit(_prepare, self.config, self.directories, self.given_up)
            background.shutdown(wait=False)
            watch = Watch(self.config.runner.hang_timeout)
            session = self.session = self.stack.enter_context(open_session(self.config.cluster, watch))
            self.stop.install()
        watch.often.append(self.stop.check)
        watch.rarely += [guard.check_head, lambda: _check_nodes(session, self.stop)]
        with self.stop.immediate():
            self.supervisor = self._supervisor(session, preparing)
        return self.supervisor.run()

    def _supervisor(self, session: Session, preparing: Future[Prepared]) -> Supervisor:
        """Workers on their way, and who looks after them."""
        config = self.config
        prepared = preparing.result()
        log_line(f"ray: {session.address}; device: {session.device}; {_describe(session)}")
        _say_if_slow(config, session.device)
        _make_paths_absolute(config)
        workers = Workers(config, session, self.directories.log / "workers.json")
        self.stack.callback(workers.kill)
        # Imported here, so that worker processes are on their way before the driver spends seconds on its imports.
        from rlinf_lite.recovery.build import Build
        from rlinf_lite.recovery.supervisor import Supervisor

        build = Build(
            config=config,
            prepared=prepared,
            checkpoints=self.directories.checkpoints,
            log=self.directories.log,
            stop=self.stop,
            request=self.request,
            started=self.started,
        )
        return Supervisor(build, workers, self.budget)

    def stopped(self, interrupted: Interrupted) -> int:
        """Say what is saved and how to go on; returns the exit code.

        Raises:
            Interrupted: so early that there is nothing to say yet.
        """
        if self.supervisor is None or own_ray.started():
            guard.abandon(interrupted.reason)  # whoever asked does not wait: `main_math.leave` ends what still runs
        if self.supervisor is None:
            raise interrupted
        from rlinf_lite.checkpoint import layout

        runner = self.supervisor.runner
        there = layout.committed(self.directories.checkpoints)
        done = "before the first step" if runner is None else f"{runner.progress.step} of {runner.last_step} steps"
        log_line(f"interrupted by {interrupted.reason}: {done}; newest checkpoint: {there[0] if there else 'none'}")
        log_line(f"  go on        {_go_on(self.config, early=True, saved=self.has_saved)}")
        return interrupted.code

    @property
    def has_saved(self) -> bool:
        """As `Supervisor.has_saved`."""
        return self.supervisor is not None and self.supervisor.has_saved

    def start_anew(self, lost: RayLost) -> None:
        """Without Ray no connection of this process is of use: it becomes a new driver with the same process id.

        Locks and files are given back by that (they are close-on-exec); no clean-up of Ray's is waited for. Returns
        only if a signal came meanwhile.

        Raises:
            GaveUp: that came too often.
            RayLost: a cluster that this driver was about to join: which one is not known any more.
        """
        private = own_ray.started()
        if self.session is None and not private:
            raise lost
        self._admit(lost)
        own_ray.end()
        self._become_new(None if private or self.session is None else self.session.address)

    def _admit(self, lost: RayLost) -> None:
        if self.supervisor is not None:
            self.supervisor.admit_ray_lost(lost)
            return
        log_line(f"!! Ray was lost: {lost}")
        number = self.budget.admit(step=0, cause="Ray was lost", death=True)
        log_line(f"   going on by itself (restart {number} of {self.budget.max_restarts})")

    def _become_new(self, address: str | None) -> None:
        environment = {_STARTED_VARIABLE: str(self.started), BUDGET_VARIABLE: self.budget.to_json()}
        if address is not None:
            environment[REJOIN_VARIABLE] = address
        arguments = [sys.executable, *sys.orig_argv[1:]]
        if self.has_saved:  # looks on the disk, which may take seconds
            arguments.append("runner.resume_dir=auto")
        if self.stop.reason is None:
            log_line("   the driver starts anew ...")
            sys.stderr.flush()
            become(sys.executable, arguments, environment, unless=lambda: self.stop.reason is not None)


def _check_nodes(session: Session, stop: Interruption) -> None:
    if not session.pulse.reachable:
        return
    if len(session.nodes) > 1 and (gone := dead(session.nodes)):
        raise NodeLost(sorted(gone))
    for node in draining(session.nodes):
        stop.ask(f"node {node} is being drained", EXIT_OUT_OF_TIME)


def _prepare(config: Config, directories: Directories, stop: threading.Event) -> Prepared:
    from rlinf_lite.recovery.prepare import prepare

    return prepare(config, directories.checkpoints, stop)


def _say_if_slow(config: Config, device: str) -> None:
    import torch

    from rlinf_lite.recovery.prepare import slow_precision

    if line := slow_precision(config, device, torch.backends.cpu.get_cpu_capability()):
        log_line(line)


def make_directories(config: Config) -> Directories:
    """Create the run's directories and make sure that they can be written; if they cannot, none is left behind.

    Raises:
        ConfigError: they cannot; names the key.
    """
    run = Path(config.runner.output_dir) / config.runner.experiment_name
    log, root = Path(config.runner.logger.log_path), config.runner.checkpoint.root
    checkpoints = run / "checkpoints" if root is None else _directory(root)
    wanted: list[tuple[str, StoragePath]] = [
        ("runner.output_dir", run),
        ("runner.logger.log_path", log),
        ("runner.output_dir" if root is None else "runner.checkpoint.root", checkpoints),
    ]
    made: list[Path] = []
    try:
        for key, directory in wanted:
            made += _missing(directory)
            _try(key, directory)
    except ConfigError:
        _remove_empty(made)
        raise
    return Directories(run=run, log=log, checkpoints=checkpoints, made=tuple(made))


def _missing(directory: StoragePath) -> list[Path]:
    """What of ``directory`` and the directories above it is not there yet, outermost first."""
    if not isinstance(directory, Path):
        return []
    return [path for path in reversed((directory, *directory.parents)) if not os.path.lexists(path)]


def _remove_empty(made: Sequence[Path]) -> None:
    """Undo `make_directories` where nothing came of it: a refused start leaves the disk as it was."""
    for path in reversed(made):
        with suppress(OSError):  # something is in it, or another start has removed it
            path.rmdir()


def _directory(root: str) -> StoragePath:
    if "://" not in root:
        return Path(root)
    # Imported here: it brings torch, which a run with a plain directory imports while Ray starts.
    from rlinf_lite.checkpoint import storage

    try:
        return storage.storage_path(root)
    except ValueError as error:
        raise ConfigError(f"runner.checkpoint.root={error}") from None


def _try(key: str, directory: StoragePath) -> None:
    probe = directory / f".probe-{uuid.uuid4().hex[:8]}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if isinstance(probe, Path):
            probe.touch(exist_ok=False)
        else:
            probe.write_bytes(b"")
        probe.unlink()
    except Exception as error:  # every kind of storage has errors of its own
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
        raise ConfigError(f"{key}: cannot write in {directory} ({reason}); choose another directory") from None


def _make_paths_absolute(config: Config) -> None:
    """Workers of a joined cluster run in other directories."""
    for settings in (config.actor.model, config.rollout.model):
        settings.model_path = _absolute(settings.model_path)
    config.actor.tokenizer.tokenizer_model = _absolute(config.actor.tokenizer.tokenizer_model)


def _absolute(model_path: str) -> str:
    return model_path if model_path.startswith("embedded:") else str(Path(model_path).resolve())


def _describe(session: Session) -> str:
    return ", ".join(f"{name} in slots {list(slots)}" for name, slots in session.placement.slots.items())


def _last_words(runner: Runner, directories: Directories, *, saved: bool) -> int:
    """Say how the run ended; returns the exit code."""
    progress, failed = runner.progress, runner.saver.failed
    early = progress.step < runner.last_step
    steps = f"stopped by runner.max_time: {progress.step} of {runner.last_step}" if early else f"done: {progress.step}"
    log_line(f"{steps} steps, {progress.num_samples} responses, {progress.num_tokens} tokens")
    log_line(f"  metrics      {directories.log / 'metrics.jsonl'}")
    log_line(f"  checkpoints  {directories.checkpoints}")
    log_line(f"  go on        {_go_on(runner.config, early=early, saved=saved)}")
    if failed:
        log_line(f"!! the last checkpoint is NOT on the disk: {failed}")
        return 1
    return EXIT_OUT_OF_TIME if early else 0


def _go_on(config: Config, *, early: bool, saved: bool) -> str:
    """What to start to resume the run.

    Args:
        early: the run is not done.
        saved: `Supervisor.has_saved`: if not, ``auto`` would find nothing, and forget where the run was to begin.
    """
    again = "the same command with runner.resume_dir=auto" if saved else "the same command"
    if early:
        return again
    allow = " runner.resume_allow_changes=[actor.optim.total_training_steps]"
    decays = config.actor.optim.lr_scheduler != "constant"
    return f"{again} runner.max_steps=<more>{allow if decays else ''}"
