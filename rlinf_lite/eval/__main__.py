"""The command line ``python -m rlinf_lite.eval MODEL``."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from rlinf_lite import numerics
from rlinf_lite.paths import argument

DESCRIPTION = """\
Evaluate a model on a data set: accuracy, pass@k and maj@k.

MODEL is a global_step_N directory, the directory of a run (its newest checkpoint that verifies), a Hugging Face
directory (an export, a base model), or embedded:tiny-arithmetic. A checkpoint is evaluated as its run validates, with
the same data, template, reward, batches and sampling seeds, so the accuracy equals the run's own val/accuracy of that
step. Keys of the training config that matter to an evaluation may follow as key=value, for example
data.prompt_key=question."""

EPILOG = """\
examples:
  python -m rlinf_lite.eval logs/grpo-1.5b/checkpoints/global_step_50
  python -m rlinf_lite.eval logs/grpo-1.5b --num-samples 16 --temperature 0.8 --output eval/step50.jsonl
  python -m rlinf_lite.eval Qwen2.5-1.5B-Instruct --config logs/grpo-1.5b     the base model, as the run validates
  python -m rlinf_lite.eval exported --data test.jsonl data.prompt_key=question data.apply_chat_template=true"""

_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)+=")
# Read when libraries are imported; the workers of a run get the same. The config may set more threads later.
_ENVIRONMENT = numerics.environment() | {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m rlinf_lite.eval",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("model", metavar="MODEL")
    top.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="keys of the training config")
    add = top.add_argument
    add("--data", nargs="+", metavar="PATH", help="problems to answer: *.jsonl, *.parquet ... ; default: the run's")
    add(
        "--config", metavar="RUN", help="take the settings of this run (its directory or config.yaml) for another model"
    )
    add("--num-samples", type=int, default=1, metavar="N", help="responses per problem; with 2 or more: pass@k, maj@k")
    add("--temperature", type=float, metavar="T", help="0 is greedy, the default for one response per problem")
    add("--top-p", type=float, metavar="P")
    add("--top-k", type=int, metavar="K")
    add("--max-new-tokens", type=int, metavar="N")
    add("--seed", type=int, metavar="N", help="seed of sampling; default: the run's")
    add("--batch-size", type=int, metavar="N", help="responses generated together; default: as the run does")
    add("--engine", metavar="NAME", help="rollout.rollout_backend; default: the run's, or builtin")
    add("--precision", choices=("fp32", "bf16", "fp16"), help="default: the run's, or as the directory is stored")
    add("--device", choices=("auto", "cpu", "cuda"))
    add("--verify", choices=("full", "size", "off"), default="full", help="how to check a checkpoint's files first")
    add(
        "--output",
        type=argument,
        metavar="FILE",
        help="write one JSON row per problem; if interrupted, the same command continues after them",
    )
    add("--overwrite", action="store_true", help="delete the rows in FILE and start again")
    add("--json", action="store_true", help="print the results as JSON")
    return top


def config_keys(options: argparse.Namespace) -> dict[str, Any]:
    """The config keys that the flags set, with their values."""
    sampling = "algorithm.val_sampling_params"
    flags = {
        f"{sampling}.temperature": options.temperature or None,
        f"{sampling}.top_p": options.top_p,
        f"{sampling}.top_k": options.top_k,
        f"{sampling}.max_new_tokens": options.max_new_tokens,
        "actor.seed": options.seed,
        "rollout.max_running_requests": options.batch_size,
        "data.val_rollout_batch_size": options.batch_size,
        "rollout.rollout_backend": options.engine,
        "rollout.model.precision": options.precision,
        "cluster.device": options.device,
        "data.val_data_paths": options.data,
        "data.type": "math" if options.data else None,
    }
    if options.temperature == 0:
        flags[f"{sampling}.do_sample"] = False
    elif options.num_samples > 1 or {options.temperature, options.top_p, options.top_k} != {None}:
        flags[f"{sampling}.do_sample"] = True
    return {key: value for key, value in flags.items() if value is not None}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 after an error message, 130 after Ctrl-C."""
    options = parse(arguments)
    from rlinf_lite.eval.command import explain, run

    try:
        run(options, config_keys(options))
    except BaseException as error:
        message, code = explain(error)
        if message is None:
            raise
        print(message, file=sys.stderr, flush=True)
        return code
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser().parse_intermixed_args(arguments)
    # --data takes every word that follows it, overrides too.
    options.overrides += [word for word in options.data or () if _OVERRIDE.match(word)]
    if options.data is not None:
        options.data = [word for word in options.data if not _OVERRIDE.match(word)]
    return options


if __name__ == "__main__":
    os.environ.update(_ENVIRONMENT)
    sys.exit(main())
