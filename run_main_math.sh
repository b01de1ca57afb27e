#!/usr/bin/env bash
# Trains with GRPO on math: creates the environment if it is missing, then passes every argument to rlinf_lite.main_math.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: bash run_main_math.sh [config-name] [hydra overrides ...]

  config-name   a file in configs/, without .yaml (default: grpo-tiny-arithmetic, a tiny model that learns sums on a CPU)
  overrides     key=value for any key of the config (docs/config.md describes all keys)

examples
  bash run_main_math.sh                                        train the embedded default, about a minute
  bash run_main_math.sh runner.max_steps=8                     the same, but only 8 steps
  bash run_main_math.sh qwen2.5-1.5b-grpo-fsdp                 another config
  bash run_main_math.sh runner.resume_dir=auto                 resume from the newest checkpoint that verifies
  bash run_main_math.sh runner.resume_dir=logs/NAME/checkpoints/global_step_50
                                                               resume from this checkpoint
  bash run_main_math.sh 'data.train_data_paths=[a.jsonl,b.jsonl]'
                                                               quotes protect brackets from the shell

Relative paths such as ./logs are relative to the current directory. A Ray cluster that `ray start --head` started is used if
there is one; otherwise a local Ray is started. The Python environment is the active one if this checkout is installed in it,
otherwise .venv beside this script.
USAGE
}

for argument in "$@"; do
    case "$argument" in
    -h | --help)
        usage
        exit 0
        ;;
    esac
done

source "$(dirname "${BASH_SOURCE[0]}")/toolkits/environment.sh"
use_environment
# -P: a directory of the caller must not shadow an installed package.
exec "$python" -P -m rlinf_lite.main_math "$@"
