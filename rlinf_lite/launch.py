"""One run, from its config to its exit code: directories, signals, cluster, workers and the supervised loop."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rlinf_lite import numerics
from rlinf_lite.cluster import own_ray
from rlinf_lite.cluster.errors import NodeLost, RayLost
from rlinf_lite.cluster.forks.client import ForkServer
from rlinf_lite.cluster.guard import guard
from rlinf_lite.cluster.nodes import dead, draining
from rlinf_lite.cluster.session import Session, open_session
from rlinf_lite.cluster.watch import Watch
from rlinf_lite.cluster.workers.warm_up import MODULES_OF_MEGATRON
from rlinf_lite.config import Config
from rlinf_lite.errors import EXIT_OUT_OF_TIME
from rlinf_lite.observability import log_line
from rlinf_lite.quick_imports import quick_imports
from rlinf_lite.recovery.directories import Directories, make_directories, remove_empty
from rlinf_lite.recovery.handover import ParentLink
from rlinf_lite.recovery.lock import hold
from rlinf_lite.recovery.restarts import RestartBudget, budget_for
from rlinf_lite.recovery.workers import start_workers
from rlinf_lite.runner.interruption import Interrupted, Interruption, on_signals
from rlinf_lite.runner.policies import SaveRequest, save_requests
from rlinf_lite.runner.signals import end
from rlinf_lite.stopwatch import Stopwatch

if TYPE_CHECKING:
    from rlinf_lite.recovery.prepare import Prepared
    from rlinf_lite.recovery.supervisor import Supervisor
    from rlinf_lite.runner.loop import Runner


def launch(config: Config, link: ParentLink, startup: Stopwatch, forks: ForkServer | None = None) -> int:
    """Run ``config`` to its end.

    Args:
        link: to the parent process.
        startup: runs since this process began.
        forks: as for `open_session`.

    Returns:
        The exit code: 0; 1 if the last checkpoint is not on the disk; that of the signal or deadline that stopped it.
    """
    directories = make_directories(config.runner)
    stop = Interruption(config.runner.preemption_grace)
    log_line(f"run: {config.runner.experiment_name}, in {directories.log}; starting ...")
    if not config.cluster.deterministic:
        log_line(f"!! {numerics.OPTED_OUT}")
    with ExitStack() as stack:
        given_up = threading.Event()  # the thread that prepares may be reading a large data set
        stack.callback(given_up.set)
        stack.callback(remove_empty, directories.made)
        for directory in directories.owned:
            stack.enter_context(hold(directory))
        request = stack.enter_context(save_requests())
        stack.enter_context(on_signals(stop))
        driver = _Driver(
            config=config,
            directories=directories,
            stop=stop,
            link=link,
            request=request,
            stack=stack,
            given_up=given_up,
            startup=startup,
            forks=forks,
        )
        try:
            return _log_end(driver.train(), directories, config, saved=driver.has_saved)
        except Interrupted as interrupted:
            return driver.stopped(interrupted)
        except RayLost as lost:
            if stop.reason is None:
                driver.ask_for_restart(lost)
            return driver.stopped(Interrupted(stop.reason, stop.code))


@dataclass(kw_only=True)
class _Driver:
    """What this process has opened for the run: Ray, workers, and the supervised loop."""

    config: Config
    directories: Directories
    stop: Interruption
    link: ParentLink
    request: SaveRequest
    stack: ExitStack
    given_up: threading.Event
    startup: Stopwatch
    forks: ForkServer | None
    session: Session | None = None
    supervisor: Supervisor | None = None

    def train(self) -> Runner:
        """Ray, workers, and the supervised run. Raises as `Supervisor.run`."""
        with quick_imports():
            supervisor = self._start()
        return supervisor.run()

    def _start(self) -> Supervisor:
        runner, handover = self.config.runner, self.link.handover
        budget = budget_for(runner.max_restarts, runner.restart_window, handover.budget)
        self.link.report(budget=budget.to_json())
        if self.forks is not None:
            self.forks.preload(self.modules)
        with self.stop.immediate():
            # Ray takes seconds to start, and so do torch's import and the data: side by side.
            background = ThreadPoolExecutor(1)
            preparing = background.submit(_prepare, self.config, self.directories, self.given_up)
            background.shutdown(wait=False)
            watch = Watch(runner.hang_timeout)
            session = self.session = self.stack.enter_context(
                open_session(
                    self.config.cluster,
                    watch,
                    handover.address,
                    self.forks,
                    with_critic=self.config.critic.use_critic_model,
                    tensor_parallel_size=self.config.rollout.tensor_parallel_size,
                )
            )
            self.stop.install()
            self.startup.lap("ray")
        if not own_ray.started():
            self.link.report(address=session.address)
        watch.often.append(self.stop.check)
        watch.rarely += [guard.check_head, lambda: _check_nodes(session, self.stop)]
        with self.stop.immediate():
            self.supervisor = self._supervisor(session, preparing, budget)
        return self.supervisor

    @property
    def modules(self) -> Sequence[str]:
        """What workers import for this config besides the usual."""
        return MODULES_OF_MEGATRON if self.config.actor.training_backend == "megatron" else ()

    def _supervisor(self, session: Session, preparing: Future[Prepared], budget: RestartBudget) -> Supervisor:
        """Start the workers, and put the supervisor in charge of them."""
        config = self.config
        session.preload(self.modules)  # as above, for a server that was started since
        prepared = preparing.result()
        self.startup.lap("data")
        log_line(f"ray: {session.address}; device: {session.device}; {_describe(session)}")
        _log_if_slow(config, session.device)
        _make_paths_absolute(config)
        workers = start_workers(config, session, self.directories.log / "workers.json")
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
            started=self.link.handover.started,
            startup=self.startup,
        )
        return Supervisor(build, workers, budget, self.link)

    def stopped(self, interrupted: Interrupted) -> int:
        """Log what is saved and how to resume; returns the exit code.

        Raises:
            Interrupted: nothing was built yet.
        """
        if self.supervisor is None or own_ray.started():
            guard.abandon(interrupted.reason)  # nobody waits for Ray's own end: `driver.leave` ends what still runs
        if self.supervisor is None:
            raise interrupted
        from rlinf_lite.checkpoint import layout

        runner = self.supervisor.runner
        there = layout.committed(self.directories.checkpoints)
        done = "before the first step" if runner is None else f"{runner.progress.step} of {runner.last_step} steps"
        log_line(f"interrupted by {interrupted.reason}: {done}; newest checkpoint: {there[0] if there else 'none'}")
        log_line(f"  resume       {_how_to_resume(self.config, early=True, saved=self.has_saved)}")
        return interrupted.code

    @property
    def has_saved(self) -> bool:
        """As `Supervisor.has_saved`."""
        return self.supervisor is not None and self.supervisor.has_saved

    def ask_for_restart(self, lost: RayLost) -> NoReturn:
        """End this process without Ray, which none of its connections survives; the parent starts a new driver.

        The kernel gives locks and files back; nothing of Ray's is waited for.

        Raises:
            RayLost: there is no parent; or a cluster is lost that this driver was about to join, and whose address is
                not known.
        """
        if not self.link.is_connected or (self.session is None and not own_ray.started()):
            raise lost
        self.link.report(ray_lost=str(lost))
        sys.stdout.flush()
        sys.stderr.flush()
        end(lost.exit_code)


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


def _log_if_slow(config: Config, device: str) -> None:
    import torch

    from rlinf_lite.recovery.prepare import slow_precision

    if line := slow_precision(config.actor, config.rollout.model, device, torch.backends.cpu.get_cpu_capability()):
        log_line(line)


def _make_paths_absolute(config: Config) -> None:
    """Workers of a joined cluster run in other directories."""
    for settings in (config.actor.model, config.rollout.model):
        settings.model_path = _absolute(settings.model_path)
    config.actor.tokenizer.tokenizer_model = _absolute(config.actor.tokenizer.tokenizer_model)


def _absolute(model_path: str) -> str:
    return model_path if model_path.startswith("embedded:") else str(Path(model_path).resolve())


def _describe(session: Session) -> str:
    return ", ".join(f"{name} in slots {list(slots)}" for name, slots in session.placement.slots.items())


def _log_end(runner: Runner, directories: Directories, config: Config, *, saved: bool) -> int:
    """Log how the run ended; returns the exit code."""
    progress, failed = runner.progress, runner.saver.failed
    early = progress.step < runner.last_step
    steps = f"stopped by runner.max_time: {progress.step} of {runner.last_step}" if early else f"done: {progress.step}"
    log_line(f"{steps} steps, {progress.num_samples} responses, {progress.num_tokens} tokens")
    log_line(f"  metrics      {directories.log / 'metrics.jsonl'}")
    log_line(f"  checkpoints  {directories.checkpoints}")
    log_line(f"  resume       {_how_to_resume(config, early=early, saved=saved)}")
    if failed:
        log_line(f"!! the last checkpoint is NOT on the disk: {failed}")
        return 1
    return EXIT_OUT_OF_TIME if early else 0


def _how_to_resume(config: Config, *, early: bool, saved: bool) -> str:
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
