"""Builds the metric sinks of a run, passes them each step's metrics, and keeps their state for checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypedDict

from rlinf_lite import faults
from rlinf_lite.config import ConfigError, LoggerConfig, nearest
from rlinf_lite.observability.console import ConsoleSink
from rlinf_lite.observability.jsonl import JsonlSink
from rlinf_lite.observability.notices import log_line
from rlinf_lite.observability.origin import Origin
from rlinf_lite.observability.sinks import Metrics, MetricSink
from rlinf_lite.observability.tensorboard import TensorBoardSink
from rlinf_lite.observability.wandb_sink import WandbSink, open_wandb

BACKENDS = ("tensorboard", "wandb")
METRICS_FILE = "metrics.jsonl"


class HubState(TypedDict):
    """The part of a checkpoint that belongs to the sinks, as JSON."""

    wandb_run_id: str | None
    last_step: int


class MetricHub:
    """Passes each step's metrics to all ``sinks``, in order. Steps must increase."""

    def __init__(
        self, sinks: Sequence[MetricSink], *, committed_step: int | None = None, wandb_run_id: str | None = None
    ) -> None:
        self._sinks = list(sinks)
        self._last_step = -1 if committed_step is None else committed_step
        self._wandb_run_id = wandb_run_id
        self._warned: set[str] = set()

    def log(self, step: int, metrics: Metrics) -> None:
        """Pass the metrics of a step to all sinks.

        Raises:
            ValueError: ``step`` is not after the last one, so a row would appear twice.
        """
        if step <= self._last_step:
            last = self._last_step
            raise ValueError(f"metrics of step {step} after those of step {last}; log each step once, in order")
        for sink in self._sinks:
            try:
                sink.log(step, metrics)
            except OSError as error:  # a full disk must not end the training; metrics.jsonl keeps the rows
                self._warn(sink, error)
        self._last_step = step

    def _warn(self, sink: MetricSink, error: OSError) -> None:
        name = type(sink).__name__
        if name not in self._warned:
            self._warned.add(name)
            log_line(f"!! {name}: {error.strerror or error}; the run continues, metrics.jsonl keeps every row")

    def sync(self) -> None:
        """Make ``metrics.jsonl`` durable up to the last step; called before each save.

        Raises:
            OSError: a row cannot be written.
        """
        for sink in self._sinks:
            if isinstance(sink, JsonlSink):
                sink.sync()

    def state(self) -> HubState:
        """The state to save in a checkpoint; `build_hub` restores it."""
        for sink in self._sinks:
            if isinstance(sink, WandbSink):
                self._wandb_run_id = sink.run_id  # it may have branched off to a new run
        return {"wandb_run_id": self._wandb_run_id, "last_step": self._last_step}

    def close(self) -> None:
        """Close every sink, then raise the first error that one of them raised."""
        self._wandb_run_id = self.state()["wandb_run_id"]
        failures: list[Exception] = []
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:  # the other sinks still have rows to write
                failures.append(error)
        self._sinks = []
        if failures:
            raise failures[0]


def build_hub(
    config: LoggerConfig,
    *,
    committed_step: int | None,
    config_dict: Mapping[str, Any],
    num_steps: int | None = None,
    state: HubState | None = None,
    origin: Origin | None = None,
) -> MetricHub:
    """Build the hub of a run: ``metrics.jsonl``, the console, and the sinks that ``logger_backends`` names.

    Args:
        committed_step: step of the checkpoint that the run resumes from; None for a new run.
        config_dict: the resolved config, for wandb.
        num_steps: steps of the whole run, for the console; None if there is no limit.
        state: that of ``MetricHub.state`` in that checkpoint.
        origin: what decides the numbers of the next rows, for sinks that cannot drop rows; None if not known.

    Raises:
        ConfigError: an unknown backend, or one whose package is missing.
    """
    check_backends(config.logger_backends)
    log_path = Path(config.log_path)
    metrics_file = log_path / METRICS_FILE
    run_id = None if state is None else state["wandb_run_id"]
    with ExitStack() as undo:
        sinks: list[MetricSink] = []
        for sink in _sinks(config, metrics_file, committed_step, run_id, config_dict, num_steps, origin or Origin()):
            undo.callback(sink.close)
            sinks.append(sink)
            run_id = sink.run_id if isinstance(sink, WandbSink) else run_id
        undo.pop_all()
    return MetricHub(sinks, committed_step=committed_step, wandb_run_id=run_id)


def check_backends(backends: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: a backend that is not one of `BACKENDS`.
    """
    for name in backends:
        if name not in BACKENDS:
            known = ", ".join(BACKENDS)
            hint = nearest(name, list(BACKENDS))
            raise ConfigError(f"runner.logger.logger_backends: unknown backend {name!r}; choose from {known}{hint}")


def _sinks(
    config: LoggerConfig,
    metrics_file: Path,
    committed_step: int | None,
    run_id: str | None,
    config_dict: Mapping[str, Any],
    num_steps: int | None,
    origin: Origin,
) -> Iterator[MetricSink]:
    step = committed_step or 0
    # First, because what it drops on a resume must not reach wandb as history.
    faults.reach("resume.metrics", step=step)
    yield JsonlSink(metrics_file, committed_step=committed_step)
    if "tensorboard" in config.logger_backends:
        faults.reach("resume.tensorboard", step=step)
        yield TensorBoardSink(metrics_file.parent / "tensorboard", committed_step=committed_step)
    if "wandb" in config.logger_backends:
        faults.reach("resume.wandb", step=step)
        sink = open_wandb(
            config,
            committed_step=committed_step,
            run_id=run_id,
            config_dict=config_dict,
            metrics_file=metrics_file,
            origin=origin,
        )
        if sink is not None:
            yield sink
    yield ConsoleSink(num_steps=num_steps, committed_step=committed_step)
