"""A run from its config to its last words: folders, signals, cluster, workers, the supervised loop, the exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rlinf_lite import numerics
from rlinf_lite.cluster.errors import NodeLost, RayLost
from rlinf_lite.cluster.joining import REJOIN_VARIABLE
from rlinf_lite.cluster.nodes import RayPulse, dead, draining
from rlinf_lite.cluster.session import Session, open_session
from rlinf_lite.cluster.watch import Watch
from rlinf_lite.config import Config, ConfigError
from rlinf_lite.observability import say
from rlinf_lite.runner.crew import Crew
from rlinf_lite.runner.failures import EXIT_OUT_OF_TIME
from rlinf_lite.runner.interruption import STOP_SIGNALS, Interrupted, Interruption, on_signals
from rlinf_lite.runner.lock import hold
from rlinf_lite.runner.policies import SaveRequest, save_requests
from rlinf_lite.runner.restarts import BUDGET_VARIABLE, budget_for

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
    say(f"run: {config.runner.experiment_name}, in {folders.log}; starting ...")
    if not config.cluster.deterministic:
        say(f"!! {numerics.OPTED_OUT}")
    with ThreadPoolExecutor(1) as background, ExitStack() as stack:
        given_up = threading.Event()  # the pool waits for its thread, which may be reading a large data set
        stack.callback(given_up.set)
        for folder in folders.owned:
            stack.enter_context(hold(folder))
        request = stack.enter_context(save_requests())
        stack.enter_context(on_signals(stop))
        with stop.immediate():
            # Ray takes seconds to start, and so do torch's import and the data: side by side.
            preparing = background.submit(_prepare, config, folders, given_up)
            watch = Watch(config.runner.hang_timeout)
            session = stack.enter_context(open_session(config.cluster, watch))
            stop.install()
            pulse = RayPulse()
        stack.enter_context(_on_child_death(watch))
        watch.often.append(stop.check)
        watch.rarely += [lambda: _check_ray(pulse), lambda: _check_nodes(session, stop, pulse)]
        supervisor = _supervisor(config, folders, session, preparing, stop, request, started, stack)
        try:
            runner = supervisor.run()
        except Interrupted as wish:
            return _stopped(wish, supervisor, folders)
        except RayLost as lost:
            if stop.reason is None:
                supervisor.admit_ray_lost(lost)
                pulse.end()
                signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # from here on one waits for the new driver
            if stop.reason is None:
                _start_anew(supervisor, private=pulse.private)
            return _stopped(Interrupted(stop.reason or str(lost), stop.code), supervisor, folders)
    return _last_words(runner, folders)


def _supervisor(
    config: Config,
    folders: Folders,
    session: Session,
    preparing: Future[Prepared],
    stop: Interruption,
    request: SaveRequest,
    started: float,
    stack: ExitStack,
) -> Supervisor:
    """Workers on their way, and who looks after them."""
    with stop.immediate():
        prepared = preparing.result()
        say(f"ray: {session.address}; device: {session.device}; {_describe(session)}")
        _say_if_slow(config, session.device)
        _make_paths_absolute(config)
        crew = Crew(config, session, folders.log / "workers.json")
        stack.callback(crew.kill)
        # Imported here, so that worker processes are on their way before the driver spends seconds on its imports.
        from rlinf_lite.runner.build import Build
        from rlinf_lite.runner.supervisor import Supervisor

        build = Build(
            config=config,
            prepared=prepared,
            checkpoints=folders.checkpoints,
            log=folders.log,
            stop=stop,
            request=request,
            started=started,
        )
        return Supervisor(build, crew, budget_for(config.runner.max_restarts, config.runner.restart_window))


@contextmanager
def _on_child_death(watch: Watch) -> Iterator[None]:
    """A raylet of our own may have died: Ray would end this process at its next word, so we must know before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCHLD, watch.hurry)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _check_ray(pulse: RayPulse) -> None:
    if (lost := pulse.lost()) is not None:
        raise RayLost(lost)


def _check_nodes(session: Session, stop: Interruption, pulse: RayPulse) -> None:
    if not pulse.reachable:
        return
    if len(session.nodes) > 1 and (gone := dead(session.nodes)):
        raise NodeLost(sorted(gone))
    for node in draining(session.nodes):
        stop.ask(f"node {node} is being drained", EXIT_OUT_OF_TIME)


def _start_anew(supervisor: Supervisor, *, private: bool) -> NoReturn:
    """Without Ray nothing of this process's connections is of use: it becomes a new driver, with the same process id.

    Locks and files are given back by that (they are close-on-exec); no clean-up of Ray's is waited for.
    """
    os.environ[_STARTED_VARIABLE] = str(supervisor.build.started)
    os.environ[BUDGET_VARIABLE] = supervisor.budget.to_json()
    if not private:
        os.environ[REJOIN_VARIABLE] = supervisor.crew.session.address
    arguments = sys.orig_argv[1:]
    if supervisor.has_saved:
        arguments = [*arguments, "runner.resume_dir=auto"]
    say("   the driver starts anew ...")
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *arguments])


def _prepare(config: Config, folders: Folders, stop: threading.Event) -> Prepared:
    from rlinf_lite.runner.prepare import prepare

    return prepare(config, folders.checkpoints, stop)


def _say_if_slow(config: Config, device: str) -> None:
    import torch

    from rlinf_lite.runner.prepare import slow_precision

    if line := slow_precision(config, device, torch.backends.cpu.get_cpu_capability()):
        say(line)


def make_folders(config: Config) -> Folders:
    """Create the run's folders and make sure that they can be written.

    Raises:
        ConfigError: they cannot; names the key.
    """
    run = Path(config.runner.output_dir) / config.runner.experiment_name
    log, root = Path(config.runner.logger.log_path), config.runner.checkpoint.root
    folders = Folders(run=run, log=log, checkpoints=run / "checkpoints" if root is None else _folder(root))
    _try("runner.output_dir", run)
    _try("runner.logger.log_path", log)
    _try("runner.output_dir" if root is None else "runner.checkpoint.root", folders.checkpoints)
    return folders


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
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except Exception as error:  # every kind of storage has errors of its own
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
        raise ConfigError(f"{key}: cannot write in {folder} ({reason}); choose another folder") from None


def _make_paths_absolute(config: Config) -> None:
    """Workers of a joined cluster run in other folders."""
    for settings in (config.actor.model, config.rollout.model):
        settings.model_path = _absolute(settings.model_path)
    config.actor.tokenizer.tokenizer_model = _absolute(config.actor.tokenizer.tokenizer_model)


def _absolute(model_path: str) -> str:
    return model_path if model_path.startswith("embedded:") else str(Path(model_path).expanduser().resolve())


def _describe(session: Session) -> str:
    return ", ".join(f"{name} in slots {list(slots)}" for name, slots in session.placement.slots.items())


def _last_words(runner: Runner, folders: Folders) -> int:
    """Say how the run ended; returns the exit code."""
    progress, failed = runner.progress, runner.saver.failed
    early = progress.step < runner.last_step
    steps = f"stopped by runner.max_time: {progress.step} of {runner.last_step}" if early else f"done: {progress.step}"
    say(f"{steps} steps, {progress.num_samples} responses, {progress.num_tokens} tokens")
    say(f"  metrics      {folders.log / 'metrics.jsonl'}")
    say(f"  checkpoints  {folders.checkpoints}")
    say(f"  go on        {_go_on(runner.config, early)}")
    if failed:
        say(f"!! the last checkpoint is NOT on the disk: {failed}")
        return 1
    return EXIT_OUT_OF_TIME if early else 0


def _stopped(wish: Interrupted, supervisor: Supervisor, folders: Folders) -> int:
    """Say what is saved and how to go on; returns the exit code."""
    from rlinf_lite.checkpoint import layout

    runner, there = supervisor.runner, layout.committed(folders.checkpoints)
    done = "before the first step" if runner is None else f"{runner.progress.step} of {runner.last_step} steps"
    say(f"interrupted by {wish.reason}: {done}; newest checkpoint: {there[0] if there else 'none'}")
    say(f"  go on        {_go_on(supervisor.build.config, early=True)}")
    return wish.code


def _go_on(config: Config, early: bool) -> str:
    again = "the same command"
    if config.runner.resume_mode == "full":
        again += " with runner.resume_dir=auto"
    if early:
        return again
    allow = " runner.resume_allow_changes=[actor.optim.total_training_steps]"
    decays = config.actor.optim.lr_scheduler != "constant"
    return f"{again} runner.max_steps=<more>{allow if decays else ''}"
