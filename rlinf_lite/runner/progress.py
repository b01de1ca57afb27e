"""What the run has done so far: every counter in one place, all moved together, before anything is saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(kw_only=True, slots=True)
class Progress:
    step: int = 0
    """Completed steps."""
    cursor: int = 0
    """Prompts used: where in the stream the next step begins."""
    num_samples: int = 0
    """Responses of all steps, those that a step left out included."""
    num_tokens: int = 0
    """Their tokens, prompts included."""
    best_val_accuracy: float = -1.0
    """-1 before the first validation."""
    best_val_step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    """Best value so far of each metric that a save may wait for."""

    unlogged: dict[str, float] = field(default_factory=dict)
    """Metrics of the last completed step while its validation and its row are still to come; empty after that."""

    def after_step(self, *, num_prompts: int, num_samples: int, num_tokens: int) -> Progress:
        """A copy in which one more step is completed."""
        after = deepcopy(self)
        after.step += 1
        after.cursor += num_prompts
        after.num_samples += num_samples
        after.num_tokens += num_tokens
        return after

    def become(self, other: Progress) -> None:
        """Take all counters of ``other``: whoever holds this object sees them."""
        for counter in fields(self):
            setattr(self, counter.name, deepcopy(getattr(other, counter.name)))

    @property
    def logged_step(self) -> int:
        """The last step whose row is written."""
        return self.step - bool(self.unlogged)

    def validated(self, accuracy: float) -> None:
        """Remember the best validation; of equal ones the first."""
        if accuracy > self.best_val_accuracy:
            self.best_val_accuracy, self.best_val_step = accuracy, self.step

    def improved(self, metric: str, value: float, mode: str) -> bool:
        """Whether ``value`` is better (``max`` or ``min``) than any before; remembers it. NaN is never better."""
        best = self.best.get(metric)
        better = value == value if best is None else (value > best if mode == "max" else value < best)
        if better:
            self.best[metric] = value
        return better

    def state(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state(cls, state: Any) -> Progress:
        """What `state` gave.

        Raises:
            ValueError: a counter is missing, unknown, or holds what a counter of a run never holds; names it.
        """
        if not isinstance(state, dict):
            raise ValueError(f"progress is a {type(state).__name__}, not a dict of counters")
        if state.keys() != set(cls.__dataclass_fields__):
            expected = sorted(cls.__dataclass_fields__)
            raise ValueError(f"progress holds {sorted(map(str, state))}, expected {expected}: another version wrote it")
        for name, value in state.items():
            if not _KINDS[cls.__dataclass_fields__[name].type](value) or (name == "best" and _holds_nan(value)):
                raise ValueError(f"progress.{name}={value!r:.60}: no run of this version writes that")
        if state["best_val_step"] > state["step"]:
            raise ValueError(f"progress.best_val_step={state['best_val_step']} is after step {state['step']}")
        return cls(**deepcopy(state))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int)


def _is_metrics(value: Any) -> bool:
    return isinstance(value, dict) and all(type(key) is str and _is_number(part) for key, part in value.items())


def _holds_nan(metrics: Mapping[str, float]) -> bool:
    return any(math.isnan(value) for value in metrics.values())


_KINDS: dict[Any, Callable[[Any], bool]] = {
    "int": _is_count,
    "float": lambda value: _is_number(value) and math.isfinite(value),
    "dict[str, float]": _is_metrics,
}
"""By the annotation of a field: what it may hold. Metrics of a step may be NaN, the best so far may not."""
