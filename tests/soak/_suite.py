"""The undisturbed run, then case after case, and a line about each."""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from _case import Case, Outcome
from _compare import differences
from _job import SETTINGS, Begin, Job
from _plan import CRITIC, KINDS, Pace, draw, draw_ranks
from _traps import CRITIC_PHASES, PHASES, Traps

if TYPE_CHECKING:  # only a run with --cluster needs it
    from _nodes import Nodes

_UNDISTURBED_SECONDS = 900
_MOST_SHOWN = 8
_HOPELESS = 20  # runs without one kill
_SAVE_INTERVAL = "runner.save_interval"


class Suite:
    """Cases one after the other, until enough kills have struck."""

    def __init__(
        self,
        options: argparse.Namespace,
        overrides: Sequence[str],
        settings: Mapping[str, str],
        root: Path,
        nodes: Nodes | None,
        begin: Begin,
    ) -> None:
        """
        Args:
            options: of the command line.
            overrides: of the command line, ``key=value``.
            settings: what the algorithm and the overrides set.
            root: an empty directory, for the runs.
            begin: starts their commands.
        """
        self._options, self._overrides, self._root, self._nodes = options, overrides, root, nodes
        self._begin = begin
        self._settings = {
            **SETTINGS,
            "cluster.component_placement.actor": f"0-{options.ranks - 1}",
            **({} if nodes is None else {"cluster.num_nodes": str(nodes.size)}),
            **settings,
        }
        phases = (*PHASES, *CRITIC_PHASES) if CRITIC in options.victims else PHASES
        self._traps = Traps(root / "traps", phases)
        self._reference = Job(root=root / "undisturbed", settings={**self._settings, _SAVE_INTERVAL: "1"}, begin=begin)
        self._undisturbed_directory = options.undisturbed or self._reference.directory
        self._struck: Counter[str] = Counter()
        self._equal = self._runs = self._failed = 0

    def run(self) -> int:
        """Returns how many runs were not as they should be."""
        pace, wanted = self._undisturbed(), self._options.kills
        if self._options.case is not None:
            self._case(self._options.case, 0, pace)
        else:
            for number in itertools.count(1):
                if (left := wanted - self._struck.total()) <= 0:
                    break
                if number > _HOPELESS and not self._struck:
                    print(f"no victims: {_HOPELESS} runs have none of {', '.join(self._options.victims)}")
                    return 1
                self._case(number, left, pace)
        tally = ", ".join(f"{kind} {count}" for kind, count in sorted(self._struck.items()))
        print(f"{self._struck.total()} kills, {self._equal} bit-equal; {self._runs} runs; {tally}", flush=True)
        return self._failed

    def _undisturbed(self) -> Pace:
        """Run the job to its end, unless such a run is given; every other run is held against it."""
        pace = Pace(start=0.0, step=0.0, recovery=0.0)
        if self._options.undisturbed is not None:
            return pace
        outcome = Case(self._reference, (), pace, self._nodes, self._traps, _UNDISTURBED_SECONDS).run()
        if outcome.wrong or outcome.exit_codes != [0]:
            sys.exit(f"the run that nothing happened to:\n{self._reference.output.read_text()}\n{outcome}")
        pace.recovery = pace.step
        print(
            f"undisturbed: first step after {pace.start:.1f} s, {pace.step:.2f} s per step; in {self._root}", flush=True
        )
        return pace

    def _case(self, number: int, most_kills: int, pace: Pace) -> None:
        options, last_step = self._options, self._reference.last_step
        plan = draw(options.seed, number, options.victims, options.kills_per_run, last_step, most_kills)
        interval = plan.save_interval if not any(text.startswith(_SAVE_INTERVAL) for text in self._overrides) else None
        job = Job(
            root=self._root / f"case{number}",
            settings={**self._settings, **({} if interval is None else {_SAVE_INTERVAL: interval})},
            begin=self._begin,
            ranks_of=partial(draw_ranks, options.seed, number) if options.elastic else None,
        )
        limit = options.limit or 300 + 10 * pace.start
        outcome = Case(job, plan.kills, pace, self._nodes, self._traps, limit).run()
        if not outcome.wrong:
            outcome.wrong += differences(
                self._undisturbed_directory, job.directory, job.last_step, same_ranks=not options.elastic
            )
        if options.strict and outcome.early:
            outcome.wrong.append(f"commands ended early without a cause of ours, with exit codes {outcome.early}")
        self._count(outcome)
        print(_line(f"seed {options.seed} case {number}", job.settings[_SAVE_INTERVAL], outcome), flush=True)
        if outcome.wrong:
            print(f"    kept: {job.output}\n    again: {self._again(number, len(plan.kills))}", flush=True)
        elif not options.keep:
            shutil.rmtree(job.root)

    def _count(self, outcome: Outcome) -> None:
        self._runs += 1
        self._struck.update(death.kill.victim for death in outcome.deaths)
        self._equal += 0 if outcome.wrong else len(outcome.deaths)
        self._failed += bool(outcome.wrong)

    def _again(self, number: int, num_kills: int) -> str:
        options = self._options
        words = [f"--seed {options.seed} --case {number} --kills-per-run {num_kills} --ranks {options.ranks}"]
        words += [f"--algorithm {options.algorithm}"] if options.algorithm != "grpo" else []
        words += [f"--victims {','.join(options.victims)}"] if options.victims != KINDS else []
        words += [f"--{name}" for name in ("cluster", "elastic", "strict") if vars(options)[name]]
        return " ".join(["python tests/soak/chaos.py", *words, *self._overrides])


def _line(name: str, save_interval: str, outcome: Outcome) -> str:
    """One line, and one more for each thing that is wrong."""
    restarts = f", {len(outcome.exit_codes) - 1} restarts" if len(outcome.exit_codes) > 1 else ""
    ranks = f", ranks {', '.join(map(str, outcome.ranks))}" if outcome.ranks else ""
    missed = f", {outcome.missed} came too late" if outcome.missed else ""
    gave_up = f", {outcome.gave_up} after three equal kills" if outcome.gave_up else ""
    verdict = "DIFFERS" if outcome.wrong else "bit-equal" if outcome.deaths else "bit-equal, but nothing was killed"
    shown = [f"\n    {text}" for text in outcome.wrong[:_MOST_SHOWN]]
    more = [f"\n    and {len(outcome.wrong) - _MOST_SHOWN} more"] if len(outcome.wrong) > _MOST_SHOWN else []
    deaths = "; ".join(map(str, outcome.deaths)) or "no kill"
    return (
        f"{name}, a save every {save_interval}: {deaths}{missed}{restarts}{ranks}{gave_up}; "
        f"{outcome.repeated} steps done again; {outcome.seconds:.1f} s: {verdict}{''.join([*shown, *more])}"
    )
