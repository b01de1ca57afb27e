"""Building a run from its config: folders, cluster, workers, data, checkpoint; then the loop; then the last words."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from rlinf_lite.cluster.group import WorkerGroup
from rlinf_lite.cluster.session import Session, open_session
from rlinf_lite.config import Config, ConfigError, flatten
from rlinf_lite.observability import JsonlSink, build_hub, say

if TYPE_CHECKING:
    from rlinf_lite.data import ProblemSet
    from rlinf_lite.runner.loop import Runner
    from rlinf_lite.runner.resume import Start


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
    with open_session(config.cluster) as session, ExitStack() as stack:
        say(f"ray: {session.address}; device: {session.device}; {_describe(session)}")
        groups = spawn(config, session)
        for group in groups.values():
            stack.callback(group.kill)
        runner = build_runner(config, session, groups, folders, stack)
        if runner.progress.step >= runner.last_step:
            say(f"nothing to do: step {runner.progress.step} of {runner.last_step} is already completed")
        runner.run()
    _last_words(runner, folders)
    return runner.save_failed is None


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
    """Start every worker process. They import what they need while the driver reads the data."""
    workers = "rlinf_lite.cluster.workers"
    return {
        "actor": WorkerGroup(
            config.actor.group_name, "actor", f"{workers}:ActorWorker", session, config, session.device
        ),
        "rollout": WorkerGroup(
            config.rollout.group_name, "rollout", f"{workers}:RolloutWorker", session, config, session.device
        ),
        "reward": WorkerGroup(
            config.reward.group_name, "reward", "rlinf_lite.cluster.reward_worker:RewardWorker", session, config.reward
        ),
    }


def build_runner(
    config: Config, session: Session, groups: dict[str, WorkerGroup], folders: Folders, stack: ExitStack
) -> Runner:
    """Data, models, checkpoint and sinks, in the order in which they can fail soonest."""
    # Imported here, so that worker processes are on their way before the driver spends seconds on importing torch.
    from rlinf_lite.cluster.weight_sync import build_weight_sync
    from rlinf_lite.data import PromptStream, load_problems
    from rlinf_lite.models import folder
    from rlinf_lite.runner import identity, schedule
    from rlinf_lite.runner.loop import Runner
    from rlinf_lite.runner.resume import check_identity, choose_start, restore

    start = choose_start(config, folders.checkpoints)
    model_dir = folder.resolve(config.actor.model.model_path)
    folder.load_config(model_dir, config.actor.model.model_type)
    tokenizer = folder.load_tokenizer(
        folder.resolve(config.actor.tokenizer.tokenizer_model, "actor.tokenizer.tokenizer_model")
    )
    train = load_problems(config.data, "train", tokenizer)
    val = load_problems(config.data, "val", tokenizer) if config.runner.val_check_interval > 0 else None
    last_step = schedule.total_steps(config, len(train.problems))
    total_updates = schedule.total_updates(config, last_step)
    made_of = identity.identity(
        config,
        base_model=folder.fingerprint(model_dir),
        train_data=train.fingerprint,
        val_data=val.fingerprint if val else None,
        total_updates=total_updates,
    )
    check_identity(start, made_of, config)
    _say_data(train, val, last_step, config)

    actors, rollouts = groups["actor"], groups["rollout"]
    engines = rollouts.start("setup")
    address = actors.result(actors.start_one(0, "rendezvous"), 0)
    facts = actors.call("setup", address, str(folders.checkpoints.resolve()), total_updates)[0]
    rollouts.results(engines)
    say(f"model: {config.actor.model.model_path}, {facts['num_parameters'] / 1e6:.2f}M parameters, {actors.size} actor ranks")
    restore(start, actors, facts, config, folders.checkpoints)
    save_config(config, folders.log, start)
    return Runner(
        config=config,
        actors=actors,
        rollouts=rollouts,
        rewards=groups["reward"],
        weights=build_weight_sync(session, actors, rollouts, config.rollout.model.precision),
        stream=PromptStream(train.problems, seed=config.data.seed, shuffle=config.data.shuffle),
        val_problems=val.problems if val else (),
        **open_sinks(config, folders.log, start, last_step, stack),
        progress=start.progress,
        last_step=last_step,
        manifest_info={"identity": made_of, "compute": facts["compute"], "tied": facts["tied"]},
        pad_id=tokenizer.pad_token_id or 0,
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


def _say_data(train: ProblemSet, val: ProblemSet | None, last_step: int, config: Config) -> None:
    left_out = f", {train.num_filtered} over data.max_prompt_length left out" if train.num_filtered else ""
    held_out = f", {len(val.problems)} to validate on" if val else ""
    rows = config.data.rollout_batch_size * config.algorithm.group_size
    say(
        f"data: {len(train.problems)} problems from {train.source}{left_out}{held_out}; {last_step} steps of "
        f"{config.data.rollout_batch_size} prompts x {config.algorithm.group_size} = {rows} responses"
    )


def _last_words(runner: Runner, folders: Folders) -> None:
    say(f"done: {runner.progress.step} steps, {runner.progress.num_samples} responses, {runner.progress.num_tokens} tokens")
    say(f"  metrics      {folders.log / 'metrics.jsonl'}")
    say(f"  checkpoints  {folders.checkpoints}")
    say("  go on        the same command with runner.resume_dir=auto and a larger runner.max_steps")
    if runner.save_failed:
        say(f"!! the last checkpoint is NOT on the disk: {runner.save_failed}")
