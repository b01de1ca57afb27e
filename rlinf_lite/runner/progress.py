"""What the run has done so far: every counter in one place, all moved together, before anything is saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(kw_only=True, slots=True)
class Progress:
    step: int = 0
    """Completed steps."""
    cursor: int = 0
    """Prompts used: where in the stream the next step begins."""
    num_samples: int = 0
    """Responses trained on."""
    num_tokens: int = 0
    """Tokens trained on, prompts included."""
    best_val_accuracy: float = -1.0
    """-1 before the first validation."""
    best_val_step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    """Best value so far of each metric that a save may wait for."""

    def advance(self, *, num_prompts: int, num_samples: int, num_tokens: int) -> None:
        """Count one completed step."""
        self.step += 1
        self.cursor += num_prompts
        self.num_samples += num_samples
        self.num_tokens += num_tokens

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
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """
        Raises:
            TypeError: a counter is missing or unknown: it is another version's.
        """
        if state.keys() != set(cls.__dataclass_fields__):
            raise TypeError(f"progress holds {sorted(state)}, expected {sorted(cls.__dataclass_fields__)}")
        return cls(**state)
