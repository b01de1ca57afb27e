"""Building a run from its config: folders, cluster, workers; then the loop; then the last words."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from rlinf_lite.cluster.group import WorkerGroup
from rlinf_lite.cluster.session import Session, open_session
from rlinf_lite.config import Config, ConfigError, flatten
from rlinf_lite.observability import JsonlSink, MetricHub, build_hub, say
from rlinf_lite.runner.failures import EXIT_OUT_OF_TIME
from rlinf_lite.runner.lock import hold
from rlinf_lite.runner.policies import SaveRequest, save_requests

if TYPE_CHECKING:
    from rlinf_lite.checkpoint.storage import Folder
    from rlinf_lite.runner.loop import Runner
    from rlinf_lite.runner.prepare import Prepared
    from rlinf_lite.runner.resume import Start


_BLAME_SECONDS = 5.0


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
        The exit code: 0; 1 if the last checkpoint is not on the disk; `EXIT_OUT_OF_TIME`.
    """
    folders = make_folders(config)
    say(f"run: {config.runner.experiment_name}, in {folders.log}; starting ...")
    with ThreadPoolExecutor(1) as background, ExitStack() as stack:
        # Ray takes seconds to start, and so do torch's import and the data: side by side.
        for folder in folders.owned:
            stack.enter_context(hold(folder))
        request = stack.enter_context(save_requests())
        preparing = background.submit(_prepare, config, folders)
        session = stack.enter_context(open_session(config.cluster))
        prepared = preparing.result()
        say(f"ray: {session.address}; device: {session.device}; {_describe(session)}")
        groups = spawn(config, session)
        for group in groups.values():
            stack.callback(group.kill)
        with blame(list(groups.values())):
            runner = build_runner(config, session, groups, prepared, folders, stack, started=started, request=request)
            if runner.progress.step >= runner.last_step:
                say(f"nothing to do: step {runner.progress.step} of {runner.last_step} is already completed")
            runner.run()
    return _last_words(runner, folders)


@contextmanager
def blame(groups: Sequence[WorkerGroup]) -> Iterator[None]:
    """When a worker dies, those that were talking to it fail too, and may be heard first: name the one that died."""
    try:
        yield
    except Exception as error:
        # An error of our own says what it is about; a RuntimeError of a library may be a broken connection.
        foreign = isinstance(error, RuntimeError) and not type(error).__module__.startswith("rlinf_lite")
        deadline = time.monotonic() + _BLAME_SECONDS
        while foreign and time.monotonic() < deadline:
            for group in groups:
                if (lost := group.lost(seconds=0.2)) is not None:
                    raise lost from None
        raise


def _prepare(config: Config, folders: Folders) -> Prepared:
    from rlinf_lite.runner.prepare import prepare

    return prepare(config, folders.checkpoints)


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


def spawn(config: Config, session: Session) -> dict[str, WorkerGroup]:
    """Start every worker process. Paths are made absolute first: workers of a joined cluster run in other folders."""
    for settings in (config.actor.model, config.rollout.model):
        settings.model_path = _absolute(settings.model_path)
    config.actor.tokenizer.tokenizer_model = _absolute(config.actor.tokenizer.tokenizer_model)
    workers = {
        "actor": (config.actor.group_name, "actor_worker:ActorWorker", (config, session.device)),
        "rollout": (config.rollout.group_name, "rollout_worker:RolloutWorker", (config, session.device)),
        "reward": (config.reward.group_name, "reward_worker:RewardWorker", (config.reward,)),
    }
    return {
        component: WorkerGroup(name, component, f"rlinf_lite.cluster.{target}", session, *arguments)
        for component, (name, target, arguments) in workers.items()
    }


def _absolute(model_path: str) -> str:
    return model_path if model_path.startswith("embedded:") else str(Path(model_path).expanduser().resolve())


def _check_weights(actor: dict[str, Any], workers: list[dict[str, Any]]) -> None:
    """What the actor publishes must be what each engine holds: a weight never sent would be whatever was in memory."""
    for worker in workers:
        if worker["weights"] != actor:
            differing = sorted(dict(worker["weights"].items() ^ actor.items()))
            raise ConfigError(
                f"rollout.model.model_path: its architecture is not the actor's ({differing[0]} differs); "
                "use the same folder"
            )


def build_runner(
    config: Config,
    session: Session,
    groups: dict[str, WorkerGroup],
    prepared: Prepared,
    folders: Folders,
    stack: ExitStack,
    *,
    started: float,
    request: SaveRequest,
) -> Runner:
    """Models, checkpoint and sinks."""
    # Imported here, so that worker processes are on their way before the driver spends seconds on importing torch.
    from rlinf_lite.checkpoint.storage import absolute
    from rlinf_lite.cluster.weight_sync import build_weight_sync
    from rlinf_lite.data import PromptStream
    from rlinf_lite.runner.identity import carried_on
    from rlinf_lite.runner.loop import Runner
    from rlinf_lite.runner.policies import policies
    from rlinf_lite.runner.resume import restore, saved_identity, supersede_newer, sweep
    from rlinf_lite.runner.saving import Saver

    actors, rollouts, checkpoints = groups["actor"], groups["rollout"], folders.checkpoints
    engines = rollouts.start("setup")
    address = actors.result(actors.start_one(0, "rendezvous"), 0)
    ranks = actors.call("setup", address, str(absolute(checkpoints)), prepared.total_updates)
    workers, facts = [*ranks, *rollouts.results(engines)], ranks[0]
    _check_weights(facts["weights"], workers)
    compute = "; ".join(sorted({worker["compute"] for worker in workers}))
    size = f"{facts['num_parameters'] / 1e6:.2f}M parameters"
    say(f"model: {config.actor.model.model_path}, {size}, {actors.size} actor ranks")
    sweep(checkpoints)
    start = restore(prepared.start, actors, config, checkpoints, prepared.identity, compute)
    save_config(config, folders.log, start)
    hub, samples = open_sinks(config, folders.log, start, prepared.last_step, stack)

    def flush() -> None:
        hub.sync()
        if samples is not None:
            samples.sync()

    saver = Saver(
        actors=actors,
        policies=policies(config),
        checkpoint=config.runner.checkpoint,
        progress=start.progress,
        last_step=prepared.last_step,
        info={
            "identity": carried_on(saved_identity(start), prepared.identity),
            "compute": compute,
            "tied": facts["tied"],
            "model_path": config.actor.model.model_path,
        },
        flush=flush,
        started=started,
        request=request,
    )
    if start.progress.step < prepared.last_step:
        supersede_newer(start, checkpoints)
    return Runner(
        config=config,
        actors=actors,
        rollouts=rollouts,
        rewards=groups["reward"],
        weights=build_weight_sync(session, actors, rollouts, config.rollout.model.precision),
        stream=PromptStream(prepared.train.problems, seed=config.data.seed, shuffle=config.data.shuffle),
        val_problems=prepared.val.problems if prepared.val else (),
        hub=hub,
        samples=samples,
        progress=start.progress,
        last_step=prepared.last_step,
        saver=saver,
        pad_id=prepared.pad_id,
    )


def open_sinks(
    config: Config, log: Path, start: Start, last_step: int, stack: ExitStack
) -> tuple[MetricHub, JsonlSink | None]:
    """The hub and the rollout rows, both cut back to the committed step, closed with ``stack``."""
    logger = config.runner.logger
    samples = JsonlSink(log / "rollouts.jsonl", committed_step=start.committed_step) if logger.log_rollouts else None
    if samples:
        stack.callback(samples.close)
    hub = build_hub(
        logger,
        committed_step=start.committed_step,
        config_dict=flatten(config),
        num_steps=last_step,
        state=start.hub_state,
    )
    stack.callback(hub.close)
    return hub, samples


def save_config(config: Config, log: Path, start: Start) -> None:
    """The resolved config, as YAML that can be run again. A resume keeps the first and adds its own."""
    step = start.committed_step
    name = "config.yaml" if step is None else f"config.from_step_{step}.yaml"
    (log / name).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


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


def _go_on(config: Config, early: bool) -> str:
    again = "the same command"
    if config.runner.resume_mode == "full":
        again += " with runner.resume_dir=auto"
    if early:
        return again
    allow = " runner.resume_allow_changes=[actor.optim.total_training_steps]"
    decays = config.actor.optim.lr_scheduler != "constant"
    return f"{again} runner.max_steps=<more>{allow if decays else ''}"
