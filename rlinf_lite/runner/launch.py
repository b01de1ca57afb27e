"""Building a run from its config: folders, cluster, workers; then the loop; then the last words."""

from __future__ import annotations

import tempfile
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
from rlinf_lite.observability import JsonlSink, build_hub, say
from rlinf_lite.runner.lock import hold

if TYPE_CHECKING:
    from rlinf_lite.runner.loop import Runner
    from rlinf_lite.runner.prepare import Prepared
    from rlinf_lite.runner.resume import Start


_BLAME_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Folders:
    log: Path
    checkpoints: Path


def launch(config: Config) -> bool:
    """Run ``config`` to its end.

    Returns:
        Whether the last checkpoint is on the disk.
    """
    folders = make_folders(config)
    say(f"run: {config.runner.experiment_name}, in {folders.log}; starting ...")
    with ThreadPoolExecutor(1) as background, ExitStack() as stack:
        # Ray takes seconds to start, and so do torch's import and the data: side by side.
        stack.enter_context(hold(folders.checkpoints))
        preparing = background.submit(_prepare, config, folders)
        session = stack.enter_context(open_session(config.cluster))
        prepared = preparing.result()
        say(f"ray: {session.address}; device: {session.device}; {_describe(session)}")
        groups = spawn(config, session)
        for group in groups.values():
            stack.callback(group.kill)
        with blame(list(groups.values())):
            runner = build_runner(config, session, groups, prepared, folders, stack)
            if runner.progress.step < runner.last_step:
                prepared.before_first_step(folders.checkpoints)
            else:
                say(f"nothing to do: step {runner.progress.step} of {runner.last_step} is already completed")
            runner.run()
    _last_words(runner, folders)
    return runner.save_failed is None


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
    log, checkpoints = Path(config.runner.logger.log_path), run / "checkpoints"
    for key, folder in (("runner.logger.log_path", log), ("runner.output_dir", checkpoints)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ConfigError(f"{key}: cannot write in {folder} ({error.strerror}); choose another folder") from None
    return Folders(log=log, checkpoints=checkpoints)


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
) -> Runner:
    """Models, checkpoint and sinks."""
    # Imported here, so that worker processes are on their way before the driver spends seconds on importing torch.
    from rlinf_lite.cluster.weight_sync import build_weight_sync
    from rlinf_lite.data import PromptStream
    from rlinf_lite.runner.loop import Runner
    from rlinf_lite.runner.resume import restore, sweep

    start, actors, rollouts = prepared.start, groups["actor"], groups["rollout"]
    engines = rollouts.start("setup")
    address = actors.result(actors.start_one(0, "rendezvous"), 0)
    ranks = actors.call("setup", address, str(folders.checkpoints.resolve()), prepared.total_updates)
    workers, facts = [*ranks, *rollouts.results(engines)], ranks[0]
    _check_weights(facts["weights"], workers)
    compute = "; ".join(sorted({worker["compute"] for worker in workers}))
    size = f"{facts['num_parameters'] / 1e6:.2f}M parameters"
    say(f"model: {config.actor.model.model_path}, {size}, {actors.size} actor ranks")
    sweep(folders.checkpoints)
    restore(start, actors, compute)
    save_config(config, folders.log, start)
    return Runner(
        config=config,
        actors=actors,
        rollouts=rollouts,
        rewards=groups["reward"],
        weights=build_weight_sync(session, actors, rollouts, config.rollout.model.precision),
        stream=PromptStream(prepared.train.problems, seed=config.data.seed, shuffle=config.data.shuffle),
        val_problems=prepared.val.problems if prepared.val else (),
        **open_sinks(config, folders.log, start, prepared.last_step, stack),
        progress=start.progress,
        last_step=prepared.last_step,
        manifest_info={"identity": prepared.identity, "compute": compute, "tied": facts["tied"]},
        pad_id=prepared.pad_id,
    )


def open_sinks(config: Config, log: Path, start: Start, last_step: int, stack: ExitStack) -> dict[str, Any]:
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
    return {"hub": hub, "samples": samples}


def save_config(config: Config, log: Path, start: Start) -> None:
    """The resolved config, as YAML that can be run again. A resume keeps the first and adds its own."""
    step = start.committed_step
    name = "config.yaml" if step is None else f"config.from_step_{step}.yaml"
    (log / name).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def _describe(session: Session) -> str:
    return ", ".join(f"{name} in slots {list(slots)}" for name, slots in session.placement.slots.items())


def _last_words(runner: Runner, folders: Folders) -> None:
    say(
        f"done: {runner.progress.step} steps, {runner.progress.num_samples} responses, "
        f"{runner.progress.num_tokens} tokens"
    )
    say(f"  metrics      {folders.log / 'metrics.jsonl'}")
    say(f"  checkpoints  {folders.checkpoints}")
    allow = (
        ""
        if runner.config.actor.optim.lr_scheduler == "constant"
        else (" runner.resume_allow_changes=[actor.optim.total_training_steps]")
    )
    say(f"  go on        the same command with runner.resume_dir=auto runner.max_steps=<more>{allow}")
    if runner.save_failed:
        say(f"!! the last checkpoint is NOT on the disk: {runner.save_failed}")
