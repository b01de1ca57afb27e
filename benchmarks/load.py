"""Row 9 of docs/performance.md: loading a checkpoint with `verify=full` from a cold disk, beside a plain read.

Two gloo ranks hold a Llama of 135M parameters with AdamW's state (fp32, FSDP2: 1.6 GB) and load a checkpoint of it.
Two processes read the same files plainly, half of the bytes each, into one buffer. Before every measurement the files
are dropped from the page cache. The figures are GB/s of the slower process.

    python benchmarks/load.py [--rounds 5] [--dir DIR] [--out FILE.json] [--ranks 2]

Linux only. Needs 4 GB of memory and 2 GB of a real disk. All files are removed.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from _paired import arguments, finish

from rlinf_lite import numerics


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--dir", type=Path, default=Path(), help="where to write (a real disk); default: here")
    parser.add_argument("--ranks", type=int, default=2, help="default: %(default)s")
    options = parser.parse_args()
    os.environ.update(numerics.environment())  # of the processes that are started
    with tempfile.TemporaryDirectory(prefix="load-bench-", dir=options.dir) as directory:
        finish([measure(Path(directory).resolve(), options.ranks, options.rounds)], options.out)


def measure(directory: Path, num_ranks: int, rounds: int):
    # Here, because each process that is started imports this file anew.
    from statistics import median

    from _checkpoint_plain import drop_from_cache, file_system, files_under, split
    from _checkpoint_rank import Rank, Setup
    from _checkpoint_workers import Team
    from _paired import Row, in_turn

    setup = Setup(directory=directory, world_size=num_ranks, model_dir=None, quick=False)
    with Team("rank", [(Rank, (setup, rank)) for rank in range(num_ranks)]) as ranks:
        ranks.ask(Rank.save, "ours", 1)
        checkpoint = directory / "ours" / "global_step_1"
        files = files_under(checkpoint)
        parts, num_bytes = split(files, num_ranks), sum(file.stat().st_size for file in files)

        def load(verify: str, cold: bool = True) -> float:
            if cold:
                drop_from_cache(files)
            return num_bytes / 1e9 / max(ranks.ask(Rank.load, verify, checkpoint))

        def read() -> float:
            drop_from_cache(files)
            return num_bytes / 1e9 / max(ranks.ask(Rank.read, parts))

        row = Row(
            "9",
            f"load of {num_bytes / 1e9:.2f} GB with verify=full by {num_ranks} ranks, from a cold disk",
            "a plain read of the same files",
            goal=0.7,
            at_most=False,
            unit="GB/s",
        )
        in_turn(row, lambda: load("full"), read, rounds)
        others = {
            "verify=size": [load("size") for _ in range(rounds)],
            "verify=full, from the page cache": [load("full", cold=False) for _ in range(rounds)],
        }
        row.details = {name: f"{median(found):.2f} GB/s" for name, found in others.items()}
        row.details["file system"] = file_system(directory)
    return row


if __name__ == "__main__":
    main()
