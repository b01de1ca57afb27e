"""The command line ``python -m rlinf_lite.selfcheck CONFIG``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from rlinf_lite import numerics

DESCRIPTION = """\
Check that this machine repeats every bit of engine and update, and that both compute the same log-probs.

CONFIG is the name of a config, or the path of a YAML (also a run's config.yaml); without it, the embedded default.
Overrides may follow as key=value. The config's model and engine are built in this process, with base weights and random
prompts, and run twice, in several compositions, and operation by operation. No data is read, and no Ray is needed."""

EPILOG = """\
examples:
  python -m rlinf_lite.selfcheck
  python -m rlinf_lite.selfcheck qwen3-0.6b-1gpu actor.model.model_path=/data/Qwen3-0.6B
  python -m rlinf_lite.selfcheck logs/grpo-1.5b/config.yaml cluster.deterministic=false

exit codes: 0, 1 if something that should be equal differs, 2 after an error message"""

# Read when libraries are imported; the workers of a run get the same.
_ENVIRONMENT = numerics.environment() | {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rlinf_lite.selfcheck",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*")
    options = parser.parse_args(arguments)
    from rlinf_lite import errors
    from rlinf_lite.config.compose import load
    from rlinf_lite.selfcheck.command import run

    try:
        return run(load([word for word in (options.config, *options.overrides) if word is not None]))
    except Exception as error:
        message, code = errors.explain(numerics.user_error(error) or error)
        if message is None:
            raise
        print(message, file=sys.stderr, flush=True)
        return code


if __name__ == "__main__":
    os.environ.update(_ENVIRONMENT)
    sys.exit(main())
