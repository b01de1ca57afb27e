"""Records what a run does: metrics (console, ``metrics.jsonl``, TensorBoard, wandb), events, and phase timings."""

from rlinf_lite.observability.events import Event, EventLog, read_events
from rlinf_lite.observability.hub import BACKENDS, HubState, MetricHub, build_hub, check_backends
from rlinf_lite.observability.jsonl import JsonlSink, read_jsonl_rows
from rlinf_lite.observability.notices import log_line
from rlinf_lite.observability.origin import Origin
from rlinf_lite.observability.sinks import Metrics, MetricSink
from rlinf_lite.observability.timers import PhaseTimer

__all__ = [
    "BACKENDS",
    "Event",
    "EventLog",
    "HubState",
    "JsonlSink",
    "MetricHub",
    "MetricSink",
    "Metrics",
    "Origin",
    "PhaseTimer",
    "build_hub",
    "check_backends",
    "log_line",
    "read_events",
    "read_jsonl_rows",
]
