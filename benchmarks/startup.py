"""Rows 7 and 8 of docs/performance.md: seconds from the command to the first completed step, cold and on a resume.

A cold start of the embedded default is compared with the import of torch, transformers and ray in one process, and a
resume with the cold start of the same run. Files are in the cache: a first round is not counted.

    python benchmarks/startup.py [--rounds 5] [--out FILE.json] [key=value ...]

``key=value`` are hydra overrides.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from _paired import Row, arguments, finish
from _run import STEP, Run

_IMPORTS = "import torch, transformers, ray"
_WITH_MODEL = f"{_IMPORTS}; from transformers import AutoTokenizer, LlamaForCausalLM"
_PHASES = re.compile(r" +first step after [\d.]+ s: (.*)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """From the command to the line of the first completed step."""

    seconds: float
    phases: dict[str, float]
    """As the driver logs them, from its own start on."""


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    options, overrides = parser.parse_known_args()
    settings = dict(override.split("=", 1) for override in overrides)
    cold = Row("7", "cold start: command to first completed step", _IMPORTS, goal=1.5)
    resume = Row("8", "resume: command to first completed step", "cold start of the same run", goal=1.1)
    starts: dict[str, list[Start]] = {"cold": [], "resume": []}
    with_model: list[float] = []
    for number in range(-1, options.rounds):
        imports = [timed_import(_IMPORTS), timed_import(_WITH_MODEL)] if number % 2 == 0 else []
        with tempfile.TemporaryDirectory() as scratch:
            found = {kind: start(Path(scratch, "startup"), settings, kind) for kind in starts}
        imports = imports or [timed_import(_IMPORTS), timed_import(_WITH_MODEL)]
        if number < 0:
            continue
        for kind, one in found.items():
            starts[kind].append(one)
        cold.ours.append(found["cold"].seconds)
        cold.others.append(imports[0])
        resume.ours.append(found["resume"].seconds)
        resume.others.append(found["cold"].seconds)
        with_model.append(imports[1])
    cold.details = {
        "seconds by phase": phases(starts["cold"]),
        "import with a tokenizer's and a model's class": f"{statistics.median(with_model):.2f} s",
    }
    resume.details = {"seconds by phase": phases(starts["resume"])}
    finish([cold, resume], options.out)


def start(directory: Path, settings: dict[str, str], kind: str) -> Start:
    """Start the run, wait for its first step, and have it save and end."""
    own = {"runner.resume_dir": "auto"} if kind == "resume" else {}
    with Run(directory, {**settings, **own}) as run:
        seconds, _ = run.until(STEP)
        _, found = run.until(_PHASES)
        run.stop()
    parts = (part.rsplit(" ", 1) for part in found[1].split(", "))
    return Start(seconds=seconds, phases={name: float(part) for name, part in parts})


def phases(starts: list[Start]) -> str:
    """Median seconds by phase; ``before`` is what the driver's own clock does not see."""
    names = starts[0].phases
    parts = {"before": statistics.median(one.seconds - sum(one.phases.values()) for one in starts)}
    parts |= {name: statistics.median(one.phases[name] for one in starts) for name in names}
    return ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items())


def timed_import(statement: str) -> float:
    """Seconds of a Python that only imports."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.monotonic() - began


if __name__ == "__main__":
    main()
