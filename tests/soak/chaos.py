"""Kills a run with ``kill -9`` again and again, and compares what it ends in with the run that nothing happened to.

    python tests/soak/chaos.py --kills 200 --seed 7 [--victims driver,actor] [--ranks 2] [--cluster] [key=value ...]
    python tests/soak/chaos.py --algorithm ppo --kills 10
    python tests/soak/chaos.py --elastic --victims parent,all,damage,change --kills 20
    python tests/soak/chaos.py --seed 7 --case 12       the same victims in the same steps again

A kill strikes the driver, the parent process, an actor or critic rank, a rollout or reward worker, a raylet, or all of
them at once, at a random instant of a planned step, a start or a recovery; or it is targeted: ``phase``, the raylet
while a worker is in a given phase of a step; ``damage``, parent and driver, and a bit of the newest checkpoint;
``change``, parent and driver, and the next driver before a given change that a start makes on the disk. A driver that
dies is started again by its parent; a command whose parent was killed, or that gave up after three equal kills, is
started again, as a user would do it (with ``--elastic`` on another number of actor ranks each time). At the end
parameters, optimizer state, RNG state (not with ``--elastic``), counters, metric rows and generated tokens must be
bit-equal, no step missing or done twice, and no process left. Exit code 1 if one run is not so: its directory is kept,
and the command that repeats it printed. ``key=value`` are hydra overrides for every run.
"""

from __future__ import annotations

import argparse
import runpy
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from _job import Begin, begin
from _plan import CRITIC, KINDS
from _suite import Suite

if TYPE_CHECKING:
    from _nodes import Nodes

ALGORITHMS = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "algorithms.py"))["ALGORITHMS"]


def main(arguments: Sequence[str] | None = None, begin: Begin = begin) -> int:
    """Run the suite. Arguments are those of the command line, unless given; ``begin`` starts what is killed."""
    options, overrides = _parser().parse_known_args(arguments)
    if unknown := [text for text in overrides if text.startswith("-") or "=" not in text]:
        _parser().error(f"{unknown[0]!r} is neither an option nor a hydra override key=value")
    settings = {**ALGORITHMS[options.algorithm], **dict(text.split("=", 1) for text in overrides)}
    has_critic = settings.get("critic.use_critic_model") == "true"
    if options.victims is None:
        options.victims = (*KINDS, CRITIC) if has_critic else KINDS
    if CRITIC in options.victims and not has_critic:
        _parser().error("--victims: there is no critic; add --algorithm ppo")
    if options.elastic and options.cluster:
        _parser().error("--elastic: not with --cluster, whose nodes are as many as --ranks")
    root = Path(tempfile.mkdtemp(prefix="chaos-", dir=options.directory))
    nodes = _nodes(options.ranks + 1) if options.cluster else None
    try:
        failed = Suite(options, overrides, settings, root, nodes, begin).run()
    finally:
        if nodes is not None:
            nodes.end()
    if not failed and not options.keep:
        shutil.rmtree(root)
    return 1 if failed else 0


def _nodes(size: int) -> Nodes:
    sys.path.append(str(Path(__file__).parents[1] / "e2e"))  # where the cluster is at home
    from _nodes import Nodes

    return Nodes(size)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12, help="how many in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the whole suite (default: %(default)s)")
    parser.add_argument("--case", type=int, help="only this case")
    parser.add_argument(
        "--algorithm", choices=ALGORITHMS, default="grpo", help="as in docs/algorithms.md (default: %(default)s)"
    )
    parser.add_argument(
        "--victims",
        type=_victims,
        help=f"some of {','.join(KINDS)},{CRITIC} (default: all of them; {CRITIC} if there is one)",
    )
    parser.add_argument("--kills-per-run", type=int, help="default: drawn for each case")
    parser.add_argument("--ranks", type=int, default=2, help="actor ranks (default: %(default)s)")
    parser.add_argument("--cluster", action="store_true", help="on a Ray cluster of --ranks + 1 raylets, here")
    parser.add_argument("--elastic", action="store_true", help="another number of actor ranks, 1 to 4, at each restart")
    parser.add_argument("--strict", action="store_true", help="no command may end early without a cause of ours")
    parser.add_argument(
        "--undisturbed", type=Path, help="the directory of such a run with these settings and a save after each step"
    )
    parser.add_argument("--limit", type=float, help="seconds without a step after which a run hangs (default: ample)")
    parser.add_argument("--directory", help="where to work (default: the system's for temporary files)")
    parser.add_argument("--keep", action="store_true", help="keep every run's directory")
    return parser


def _victims(text: str) -> tuple[str, ...]:
    kinds = tuple(text.split(","))
    if unknown := set(kinds) - {*KINDS, CRITIC}:
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: choose from {','.join(KINDS)},{CRITIC}")
    return kinds


if __name__ == "__main__":
    sys.exit(main())
