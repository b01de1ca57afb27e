"""Compare checkpoints with other libraries and with the machine's limits: stall, slow-down, memory, GB/s.

    python benchmarks/checkpoint.py [--model DIR] [--dir DIR] [--json FILE] [--quick]

Two gloo ranks hold a Llama of 135M parameters (fp32, FSDP2, AdamW: 1.6 GB of state; random weights, or those of a
Hugging Face directory). A step is a rollout and an update. The rollout is a fixed amount of work in separate
processes, one per rank, while the ranks wait, as in a real run. It is the worst case for a background write, because
both use the same cores and memory bus. The update is a real one.

Every round runs each method once, in an order that rotates, and ratios are taken within a round: the speed of
disks and machines drifts. Linux only. Needs 8 GB of memory and free disk space of about three times the state. All
files are removed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rlinf_lite import numerics

if TYPE_CHECKING:
    from _checkpoint_report import Report

# For the processes that are started; the driver itself computes nothing.
ENVIRONMENT = numerics.environment() | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

STARTED = time.perf_counter()


def main() -> None:
    arguments = parse()
    os.environ.update(ENVIRONMENT)
    directory = Path(tempfile.mkdtemp(prefix="checkpoint-bench-", dir=arguments.dir))
    try:
        report = measure(directory, arguments)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(report.text())
    print(f"\n{time.perf_counter() - STARTED:.0f} s in all")
    if arguments.json:
        arguments.json.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    if report.missed() and not arguments.quick:
        sys.exit("missed: " + "; ".join(report.missed()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="Hugging Face directory of a causal LM; default: random weights, 135M"
    )
    parser.add_argument("--dir", type=Path, default=Path(), help="where to write (a real disk); default: here")
    parser.add_argument("--json", type=Path, help="file for all samples and ratios")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="at most so many; default 5 (1 with --quick)")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="begin no further round that would end later; default 8"
    )
    parser.add_argument("--rollout-seconds", type=float, help="default 8 (0.2 with --quick)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, no TRL: tries the script, measures nothing")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 5)
    if arguments.rollout_seconds is None:
        arguments.rollout_seconds = 0.2 if arguments.quick else 8.0
    return arguments


def measure(directory: Path, arguments: argparse.Namespace) -> Report:
    # Here, because each process that is started imports this file anew.
    from _checkpoint_plain import file_system
    from _checkpoint_rank import Setup
    from _checkpoint_report import Report
    from _checkpoint_rounds import Bench

    setup = Setup(
        directory=directory.resolve(), world_size=arguments.ranks, model_dir=arguments.model, quick=arguments.quick
    )
    with Bench(setup, rollout_seconds=arguments.rollout_seconds) as bench:
        report = Report(
            setup=setup,
            state_bytes=bench.state_bytes,
            rollout_seconds=arguments.rollout_seconds,
            file_system=file_system(directory),
            trl_version=bench.trl_version,
        )
        seconds = 0.0
        for number in range(arguments.rounds):
            began = time.perf_counter()
            if number and began + seconds - STARTED > 60 * arguments.minutes:
                break
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
            report.loop += bench.loop_round(number)
            report.short += bench.short_round(number)
            report.writes += bench.write_round(number)
            report.reads += bench.read_round(number)
            seconds = time.perf_counter() - began
    return report


if __name__ == "__main__":
    main()
