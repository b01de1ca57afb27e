"""wandb, online or offline, as one run however often the process was killed. It never prompts and never stops a run.

Rows cannot be taken back from wandb and need not be: replayed ones are equal. So a resume finds out which steps wandb
has (the server or the offline files say), sends the missing ones from ``metrics.jsonl`` (their tables of responses from
``rollouts.jsonl``), and leaves out the rest.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from rlinf_lite.config import LoggerConfig
from rlinf_lite.observability.events import EVENTS_FILE, RESTARTS, History
from rlinf_lite.observability.notices import say
from rlinf_lite.observability.samples import COLUMNS, samples_of
from rlinf_lite.observability.sinks import Metrics
from rlinf_lite.observability.wandb_file import recorded_steps
from rlinf_lite.observability.wandb_state import WandbState, read_state, write_state

_START_SECONDS = 60
_FINISH_SECONDS = 120
"""wandb would wait for ever on a network that is gone; what it could not send stays on disk for ``wandb sync``."""


class WandbSink:
    """Sends each step once.

    Args:
        run: what ``wandb.init`` returned.
        log_path: folder of the sidecar file.
        recorded: steps that wandb has already.
    """

    def __init__(self, run: Any, log_path: Path, recorded: Collection[int]) -> None:
        self.run_id: str = run.id
        self._run = run
        self._log_path = log_path
        self._recorded = recorded
        self._last_step = max(recorded, default=-1)
        self._lost = False
        self._closed = False
        self._history = History(log_path / EVENTS_FILE, committed_step=0)
        self._save_state()
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Metrics) -> None:
        if self._lost or step in self._recorded:
            return
        try:
            self._run.log({"step": step, **metrics, **self._beside(step)}, step=step, commit=True)
        except ConnectionError as error:
            self._give_up(error)
        else:
            self._last_step = max(step, self._last_step)

    def _beside(self, step: int) -> dict[str, Any]:
        """What rows of some steps have besides their metrics: a table of responses, the number of restarts."""
        import wandb

        beside: dict[str, Any] = {}
        if rows := samples_of(self._log_path, step):
            beside["samples/rollouts"] = wandb.Table(columns=list(COLUMNS), data=[list(row) for row in rows])
        if self._history.new(step):
            beside[RESTARTS] = self._history.num_restarts(step)
        return beside

    def close(self) -> None:
        from wandb.sdk.mailbox import HandleAbandonedError

        if self._closed:
            return
        self._closed = True
        try:
            self._run.finish()
        except (ConnectionError, HandleAbandonedError) as error:
            self._give_up(error)
        if not self._lost:
            # Not before: only now are the rows with wandb, or in its file.
            self._save_state()

    def _give_up(self, error: Exception) -> None:
        if not self._lost:
            say(f"wandb: its service process is gone ({error!r}); a resume sends what is missing from metrics.jsonl")
        self._lost = True

    def _save_state(self) -> None:
        write_state(self._log_path, WandbState(run_id=self.run_id, last_step=self._last_step))


def open_wandb(
    config: LoggerConfig,
    *,
    committed_step: int | None,
    run_id: str | None,
    config_dict: Mapping[str, Any],
    history: Iterable[Mapping[str, Any]],
) -> WandbSink | None:
    """Start or resume the wandb run; None, after a notice, where there can be none.

    Args:
        run_id: of the checkpoint; None: the one in the sidecar file, or (in a new run) a new one.
        history: rows (with ``"step"``) up to the committed step; those that wandb lacks are sent.
    """
    try:
        import wandb
    except ImportError:
        say("wandb: not installed, so nothing goes there; pip install wandb. metrics.jsonl is written as always")
        return None
    log_path = Path(config.log_path)
    log_path.mkdir(parents=True, exist_ok=True)
    state = _state_to_resume(log_path, committed_step, run_id)
    run = _start(wandb, config, state.run_id, config_dict)
    if run is None:
        return None
    sink = WandbSink(run, log_path, _steps_it_has(run, log_path, state))
    for row in history:
        sink.log(row["step"], {key: value for key, value in row.items() if key != "step"})
    return sink


def _state_to_resume(log_path: Path, committed_step: int | None, run_id: str | None) -> WandbState:
    new = WandbState(run_id=run_id or uuid.uuid4().hex[:12], last_step=-1)
    if committed_step is None:
        return new
    sidecar = read_state(log_path)
    return sidecar if sidecar is not None and run_id in (None, sidecar.run_id) else new


def _steps_it_has(run: Any, log_path: Path, state: WandbState) -> Collection[int]:
    if not run.offline:
        return range(run.starting_step)
    return recorded_steps(log_path / "wandb", state.run_id) | set(range(state.last_step + 1))


def _start(wandb: Any, config: LoggerConfig, run_id: str, config_dict: Mapping[str, Any]) -> Any:
    """The run in the mode that is asked for; offline where that fails; None where nothing works."""
    for mode in dict.fromkeys((_mode(wandb), "offline")):
        if mode == "disabled":
            say("wandb: disabled by WANDB_MODE or its settings, so nothing goes there")
            return None
        try:
            run = _init(wandb, config, run_id, config_dict, mode)
        except (wandb.errors.Error, ConnectionError) as error:
            say(f"wandb: cannot start in mode {mode} ({str(error).splitlines()[0]})")
            continue
        say(_where(config, run))
        return run
    return None


def _where(config: LoggerConfig, run: Any) -> str:
    if not run.offline:
        return f"wandb: {run.url}"
    folder = Path(config.log_path) / "wandb"
    return f"wandb: offline, run {run.id}; send it with: wandb sync {folder}/offline-run-*-{run.id}"


def _mode(wandb: Any) -> str:
    """What WANDB_MODE or wandb's settings ask for, but offline where an online run would have to ask for a key."""
    mode: str = {"dryrun": "offline", "run": "online"}.get(wandb.setup().settings.mode, wandb.setup().settings.mode)
    if mode in ("offline", "disabled"):
        return mode
    try:
        if wandb.login(prompt=False, verify=False):
            return mode
        reason = "not logged in"
    except wandb.errors.Error as error:
        reason = str(error).splitlines()[0]
    say(f"wandb: {reason}, so the run is recorded offline; to send it live, run `wandb login` before the next start")
    return "offline"


def _init(wandb: Any, config: LoggerConfig, run_id: str, config_dict: Mapping[str, Any], mode: str) -> Any:
    settings = wandb.Settings(console="off", quiet=True, init_timeout=_START_SECONDS, finish_timeout=_FINISH_SECONDS)
    return wandb.init(
        project=config.project_name,
        name=config.experiment_name,
        id=run_id,
        resume="allow",
        mode=mode,
        dir=config.log_path,
        config=dict(config_dict),
        reinit="create_new",
        settings=settings,
    )
