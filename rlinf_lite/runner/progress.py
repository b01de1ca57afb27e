"""The counters of a run. All of them move together when a step completes, before anything is saved."""

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
    """Prompts used so far: the place in the prompt stream where the next step begins."""
    num_samples: int = 0
    """Responses of all steps, including those that a step left out."""
    num_tokens: int = 0
    """Tokens of these responses, prompts included."""
    best_val_accuracy: float = -1.0
    """-1 before the first validation."""
    best_val_step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    """Best value so far of each metric that a save may wait for."""

    unlogged: dict[str, float] = field(default_factory=dict)
    """Metrics of the last completed step until it is validated and its row is written; empty after that."""

    def after_step(self, *, num_prompts: int, num_samples: int, num_tokens: int) -> Progress:
        """Return a copy in which one more step is completed."""
        after = deepcopy(self)
        after.step += 1
        after.cursor += num_prompts
        after.num_samples += num_samples
        after.num_tokens += num_tokens
        return after

    def become(self, other: Progress) -> None:
        """Take over all counters of ``other``, in place."""
        for counter in fields(self):
            setattr(self, counter.name, deepcopy(getattr(other, counter.name)))

    @property
    def logged_step(self) -> int:
        """The last step whose metrics row is written."""
        return self.step - bool(self.unlogged)

    def validated(self, accuracy: float) -> None:
        """Remember the best validation; the first one of equal ones."""
        if accuracy > self.best_val_accuracy:
            self.best_val_accuracy, self.best_val_step = accuracy, self.step

    def improved(self, metric: str, value: float, mode: str) -> bool:
        """Remember a value if it is better (``max`` or ``min``) than all before; return whether. NaN never is."""
        best = self.best.get(metric)
        better = value == value if best is None else (value > best if mode == "max" else value < best)
        if better:
            self.best[metric] = value
        return better

    def state(self) -> dict[str, Any]:
        """Return all counters, for ``data.pt``."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Any) -> Progress:
        """Read what `state` returned.

        Raises:
            ValueError: a counter is missing, unknown, or holds a value that no run writes; names the counter.
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
"""Checks the value of a field, by its annotation. Metrics of a step may be NaN, the best so far may not."""
