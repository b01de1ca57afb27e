"""The tables of the recovery benchmark: medians, ratios within a round, and targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from _recovery_job import Recovery

TARGETS = {"actor": 0.5, "rollout": 0.2}
"""Targets: the longest recovery, as a fraction of the cold start in the same round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One job: its cold start, and one recovery of each kind of worker."""

    number: int
    replicas: int
    cold: float
    step: float
    """Seconds of an ordinary step."""
    recoveries: dict[str, Recovery]

    def __str__(self) -> str:
        told = (f"{group} {recovery.seconds:.2f} s" for group, recovery in self.recoveries.items())
        return f"round {self.number + 1}, {self.replicas} replicas: cold start {self.cold:.2f} s, {', '.join(told)}"


def report(rounds: Sequence[Round]) -> bool:
    """Print the tables; whether every target is met."""
    met = []
    for replicas in sorted({each.replicas for each in rounds}):
        chosen = [each for each in rounds if each.replicas == replicas]
        print(f"\nrunner.checkpoint.memory_replicas={replicas}, {len(chosen)} rounds: medians (lowest..highest)")
        cold, step = (_spread([each.cold for each in chosen]), _spread([each.step for each in chosen]))
        print(f"  cold start to the first step's line: {cold} s; an ordinary step: {step} s")
        met += [_row(group, chosen, replicas) for group in chosen[0].recoveries]
    return all(met)


def _row(group: str, rounds: Sequence[Round], replicas: int) -> bool:
    recoveries = [each.recoveries[group] for each in rounds]
    ratios = [each.recoveries[group].seconds / each.cold for each in rounds]
    lost = max(recovery.steps_lost for recovery in recoveries)
    limit = TARGETS.get(group)
    verdicts = [] if limit is None else [_verdict(f"<= {limit} x cold start", median(ratios) <= limit)]
    if replicas:
        verdicts.append(_verdict("no completed step lost", lost <= 0))
    restarts = sum(recovery.restarts for recovery in recoveries)
    print(
        f"  {group + ' killed':<15} {_spread([each.seconds for each in recoveries])} s to the next step = "
        f"{_spread(ratios)} x cold start; completed steps lost: at most {lost}"
        f"{f'; the driver ended {restarts} times' if restarts else ''}"
    )
    if parts := _parts(recoveries):
        print(f"  {'':<15} {parts}")
    for text, _ in verdicts:
        print(f"  {'':<15} {text}")
    return all(passed for _, passed in verdicts)


def _parts(recoveries: Sequence[Recovery]) -> str:
    """Medians of the durations that the job logs; empty if it logs none."""
    told = [recovery.told for recovery in recoveries if recovery.told is not None]
    if not told:
        return ""
    names = dict.fromkeys(name for recovery in recoveries for name in recovery.parts)
    medians = (f"{name} {median(recovery.parts.get(name, 0.0) for recovery in recoveries):.2f}" for name in names)
    return f"by its own account {median(told):.2f} s: {', '.join(medians)}"


def _verdict(text: str, passed: bool) -> tuple[str, bool]:
    return f"{'met' if passed else 'MISSED'}: {text}", passed


def _spread(samples: Sequence[float]) -> str:
    return f"{median(samples):.2f} ({min(samples):.2f}..{max(samples):.2f})"
