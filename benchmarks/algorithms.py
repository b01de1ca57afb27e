"""What each algorithm makes of the embedded default: the table of docs/algorithms.md.

    python benchmarks/algorithms.py
    python benchmarks/algorithms.py --only ppo gspo --steps 20

Runs 100 steps each (about a minute on two cores), one after the other, with the settings of `ALGORITHMS` and else the
embedded default's. Prints the reward of the first step, the mean of the last ten, and the last validation's accuracy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PPO = {
    "algorithm.adv_type": "gae",
    "algorithm.loss_type": "actor_critic",
    "algorithm.normalize_advantages": "true",
    "critic.use_critic_model": "true",
    "critic.optim.lr": "1e-3",
}
ALGORITHMS: dict[str, dict[str, str]] = {
    "grpo": {},
    "dr_grpo": {"algorithm.adv_type": "dr_grpo", "algorithm.loss_agg_func": "seq-mean-token-sum-norm"},
    "rloo": {"algorithm.adv_type": "rloo"},
    "reinpp": {"algorithm.adv_type": "reinpp"},
    "reinpp_baseline": {"algorithm.adv_type": "reinpp_baseline"},
    "maxrl": {"algorithm.adv_type": "maxrl"},
    "ppo": PPO,
    "gspo": {"algorithm.loss_type": "gspo", "algorithm.n_minibatches": "2"},
    "gmpo": {"algorithm.loss_type": "gmpo", "algorithm.n_minibatches": "2"},
    "cispo": {"algorithm.loss_type": "cispo", "algorithm.n_minibatches": "2"},
    "sapo": {"algorithm.loss_type": "sapo", "algorithm.n_minibatches": "2"},
    "dapo": {
        "algorithm.dynamic_sampling": "true",
        "algorithm.max_sampling_rounds": "3",
        "algorithm.clip_ratio_high": "0.28",
        "algorithm.mask_truncated": "true",
        "algorithm.n_minibatches": "2",
    },
}
"""Settings of each, by key; tests and `tests/soak/chaos.py` use them too."""
_LAST = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS), help="default: all")
    parser.add_argument("--steps", type=int, default=100, help="default: %(default)s")
    options = parser.parse_args()
    print("| algorithm | reward, first step | last 10 steps | validation | s per step |", flush=True)
    print("|---|---|---|---|---|", flush=True)
    for name in options.only:
        with tempfile.TemporaryDirectory() as directory:
            print(row(name, options.steps, Path(directory)), flush=True)
    return 0


def row(name: str, steps: int, directory: Path) -> str:
    """Train with one algorithm; returns its row of the table."""
    given = {"runner.max_steps": steps, "runner.output_dir": directory, **ALGORITHMS[name]}
    command = [sys.executable, "-m", "rlinf_lite.main_math", *(f"{key}={value}" for key, value in given.items())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    rows = [json.loads(line) for line in next(directory.glob("*/metrics.jsonl")).read_text().splitlines()]
    last = sum(one["reward/mean"] for one in rows[-_LAST:]) / len(rows[-_LAST:])
    seconds = sorted(one["time/step"] for one in rows)[len(rows) // 2]
    accuracy = [one["val/accuracy"] for one in rows if "val/accuracy" in one][-1]
    return f"| `{name}` | {rows[0]['reward/mean']:.2f} | {last:.3f} | {accuracy:.3f} | {seconds:.2f} |"


if __name__ == "__main__":
    started = time.monotonic()
    code = main()
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    sys.exit(code)
