"""A run from its config to its last words: folders, signals, cluster, workers, the supervised loop, the exit code."""

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
from rlinf_lite.observability import say
from rlinf_lite.runner.crew import Crew
from rlinf_lite.runner.exit_codes import EXIT_OUT_OF_TIME
from rlinf_lite.runner.interruption import Interrupted, Interruption, on_signals
from rlinf_lite.runner.lock import hold
from rlinf_lite.runner.policies import SaveRequest, save_requests
from rlinf_lite.runner.restarts import BUDGET_VARIABLE, RestartBudget, budget_for
from rlinf_lite.runner.signals import become

if TYPE_CHECKING:
    from rlinf_lite.checkpoint.storage import Folder
    from rlinf_lite.runner.loop import Runner
    from rlinf_lite.runner.prepare import Prepared
    from rlinf_lite.runner.supervisor import Supervisor


_STARTED_VARIABLE = "RLINF_LITE_STARTED"
"""Environment variable: a driver that starts itself anew hands on when it began, for ``runner.max_time``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Folders:
    run: Path
    log: Path
    checkpoints: Folder
    made: tuple[Path, ...] = ()
    """Directories that were not there before, outermost first."""

    @property
    def owned(self) -> list[Path]:
        """What no other driver may use meanwhile; the lock of a checkpoints folder within the run's is enough."""
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
    folders = make_folders(config)
    stop = Interruption(config.runner.preemption_grace)
    budget = budget_for(config.runner.max_restarts, config.runner.restart_window)
    say(f"run: {config.runner.experiment_name}, in {folders.log}; starting ...")
    if not config.cluster.deterministic:
        say(f"!! {numerics.OPTED_OUT}")
    with ExitStack() as stack:
        given_up = threading.Event()  # the thread that prepares may be reading a large data set
        stack.callback(given_up.set)
        stack.callback(_remove_empty, folders.made)
        for folder in folders.owned:
            stack.enter_context(hold(folder))
        request = stack.enter_context(save_requests())
        stack.enter_context(on_signals(stop))
        driver = _Driver(
            config=config,
            folders=folders,
            stop=stop,
            budget=budget,
            request=request,
            started=started,
            stack=stack,
            given_up=given_up,
        )
        try:
            return _last_words(driver.train(), folders, saved=driver.has_saved)
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
    folders: Folders
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
            preparing = background.submit(_prepare, self.config, self.folders, self.given_up)
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
        say(f"ray: {session.address}; device: {session.device}; {_describe(session)}")
        _say_if_slow(config, session.device)
        _make_paths_absolute(config)
        crew = Crew(config, session, self.folders.log / "workers.json")
        self.stack.callback(crew.kill)
        # Imported here, so that worker processes are on their way before the driver spends seconds on its imports.
        from rlinf_lite.runner.build import Build
        from rlinf_lite.runner.supervisor import Supervisor

        build = Build(
            config=config,
            prepared=prepared,
            checkpoints=self.folders.checkpoints,
            log=self.folders.log,
            stop=self.stop,
            request=self.request,
            started=self.started,
        )
        return Supervisor(build, crew, self.budget)

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
        there = layout.committed(self.folders.checkpoints)
        done = "before the first step" if runner is None else f"{runner.progress.step} of {runner.last_step} steps"
        say(f"interrupted by {interrupted.reason}: {done}; newest checkpoint: {there[0] if there else 'none'}")
        say(f"  go on        {_go_on(self.config, early=True, saved=self.has_saved)}")
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
        say(f"!! Ray was lost: {lost}")
        number = self.budget.admit(step=0, cause="Ray was lost", death=True)
        say(f"   going on by itself (restart {number} of {self.budget.max_restarts})")

    def _become_new(self, address: str | None) -> None:
        environment = {_STARTED_VARIABLE: str(self.started), BUDGET_VARIABLE: self.budget.to_json()}
        if address is not None:
            environment[REJOIN_VARIABLE] = address
        arguments = [sys.executable, *sys.orig_argv[1:]]
        if self.has_saved:  # looks on the disk, which may take seconds
            arguments.append("runner.resume_dir=auto")
        if self.stop.reason is None:
            say("   the driver starts anew ...")
            sys.stderr.flush()
            become(sys.executable, arguments, environment, unless=lambda: self.stop.reason is not None)


def _check_nodes(session: Session, stop: Interruption) -> None:
    if not session.pulse.reachable:
        return
    if len(session.nodes) > 1 and (gone := dead(session.nodes)):
        raise NodeLost(sorted(gone))
    for node in draining(session.nodes):
        stop.ask(f"node {node} is being drained", EXIT_OUT_OF_TIME)


def _prepare(config: Config, folders: Folders, stop: threading.Event) -> Prepared:
    from rlinf_lite.runner.prepare import prepare

    return prepare(config, folders.checkpoints, stop)


def _say_if_slow(config: Config, device: str) -> None:
    import torch

    from rlinf_lite.runner.prepare import slow_precision

    if line := slow_precision(config, device, torch.backends.cpu.get_cpu_capability()):
        say(line)


def make_folders(config: Config) -> Folders:
    """Create the run's folders and make sure that they can be written; if they cannot, none is left behind.

    Raises:
        ConfigError: they cannot; names the key.
    """
    run = Path(config.runner.output_dir) / config.runner.experiment_name
    log, root = Path(config.runner.logger.log_path), config.runner.checkpoint.root
    checkpoints = run / "checkpoints" if root is None else _folder(root)
    wanted: list[tuple[str, Folder]] = [
        ("runner.output_dir", run),
        ("runner.logger.log_path", log),
        ("runner.output_dir" if root is None else "runner.checkpoint.root", checkpoints),
    ]
    made: list[Path] = []
    try:
        for key, folder in wanted:
            made += _missing(folder)
            _try(key, folder)
    except ConfigError:
        _remove_empty(made)
        raise
    return Folders(run=run, log=log, checkpoints=checkpoints, made=tuple(made))


def _missing(folder: Folder) -> list[Path]:
    """What of ``folder`` and the directories above it is not there yet, outermost first."""
    if not isinstance(folder, Path):
        return []
    return [path for path in reversed((folder, *folder.parents)) if not os.path.lexists(path)]


def _remove_empty(made: Sequence[Path]) -> None:
    """Undo `make_folders` where nothing came of it: a refused start leaves the disk as it was."""
    for path in reversed(made):
        with suppress(OSError):  # something is in it, or another start has removed it
            path.rmdir()


def _folder(root: str) -> Folder:
    if "://" not in root:
        return Path(root)
    # Imported here: it brings torch, which a run with a plain folder imports while Ray starts.
    from rlinf_lite.checkpoint import storage

    try:
        return storage.folder(root)
    except ValueError as error:
        raise ConfigError(f"runner.checkpoint.root={error}") from None


def _try(key: str, folder: Folder) -> None:
    probe = folder / f".probe-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(probe, Path):
            probe.touch(exist_ok=False)
        else:
            probe.write_bytes(b"")
        probe.unlink()
    except Exception as error:  # every kind of storage has errors of its own
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
        raise ConfigError(f"{key}: cannot write in {folder} ({reason}); choose another directory") from None


def _make_paths_absolute(config: Config) -> None:
    """Workers of a joined cluster run in other folders."""
    for settings in (config.actor.model, config.rollout.model):
        settings.model_path = _absolute(settings.model_path)
    config.actor.tokenizer.tokenizer_model = _absolute(config.actor.tokenizer.tokenizer_model)


def _absolute(model_path: str) -> str:
    return model_path if model_path.startswith("embedded:") else str(Path(model_path).resolve())


def _describe(session: Session) -> str:
    return ", ".join(f"{name} in slots {list(slots)}" for name, slots in session.placement.slots.items())


def _last_words(runner: Runner, folders: Folders, *, saved: bool) -> int:
    """Say how the run ended; returns the exit code."""
    progress, failed = runner.progress, runner.saver.failed
    early = progress.step < runner.last_step
    steps = f"stopped by runner.max_time: {progress.step} of {runner.last_step}" if early else f"done: {progress.step}"
    say(f"{steps} steps, {progress.num_samples} responses, {progress.num_tokens} tokens")
    say(f"  metrics      {folders.log / 'metrics.jsonl'}")
    say(f"  checkpoints  {folders.checkpoints}")
    say(f"  go on        {_go_on(runner.config, early=early, saved=saved)}")
    if failed:
        say(f"!! the last checkpoint is NOT on the disk: {failed}")
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
