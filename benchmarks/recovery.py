"""Measure how long a run stops when a worker is killed, compared with a cold start of the same job.

    python benchmarks/recovery.py [--rounds 5] [--settle 12] [--replicas 0 1] [key=value ...]

A round starts the job, and kills (``kill -9``) an actor rank at a random instant of a step, a rollout worker and a
reward worker at the beginning of one. The time is measured from outside, from the kill to the line of
the next completed step; the job logs its phases. A cold start is the time from the start of the process to the line of
its first step.
Exit code 1 if a target is missed: an actor rank within 0.5 of the cold start, a rollout worker within 0.2, and with a
replica in memory no completed step lost. ``key=value`` are hydra overrides.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from _recovery_job import SETTINGS, Job, JobError
from _recovery_report import Round, report

GROUPS = ("actor", "rollout", "reward")
_NUM_STEPS = 9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of each kind (default: %(default)s)")
    parser.add_argument("--settle", type=float, default=12, help="seconds of training before a kill; %(default)s")
    parser.add_argument("--replicas", type=int, nargs="+", default=[0, 1], help="runner.checkpoint.memory_replicas")
    parser.add_argument("--seed", type=int, default=1, help="of the instants of the kills")
    options, overrides = parser.parse_known_args()
    rng, rounds = random.Random(options.seed), []
    for number in range(options.rounds):
        for replicas in options.replicas:
            settings = {**SETTINGS, "runner.checkpoint.memory_replicas": str(replicas)}
            settings |= dict(override.split("=", 1) for override in overrides)
            try:
                rounds.append(measure(number, replicas, settings, options.settle, rng))
            except JobError as error:
                print(f"round {number + 1} with {replicas} replicas: {error}", flush=True)
                return 1
            print(rounds[-1], flush=True)
    return 0 if report(rounds) else 1


def measure(number: int, replicas: int, settings: Mapping[str, str], settle: float, rng: random.Random) -> Round:
    """One job, one kill of each kind, in an order that turns from round to round."""
    turn = number % len(GROUPS)
    with tempfile.TemporaryDirectory(prefix="recovery-") as directory:
        job = Job(Path(directory), dict(settings))
        try:
            cold = job.cold_start()
            step_seconds = job.step_seconds(_NUM_STEPS)
            recoveries = {}
            for group in (*GROUPS[turn:], *GROUPS[:turn]):
                job.train(settle)  # a spare process takes the dead one's place, and another the spare's
                delay = rng.uniform(0, step_seconds) if group == "actor" else 0.0
                recoveries[group] = job.recover(group, rng.randrange(2), delay)
        finally:
            job.end()
    return Round(number=number, replicas=replicas, cold=cold, step=step_seconds, recoveries=recoveries)


if __name__ == "__main__":
    sys.exit(main())
