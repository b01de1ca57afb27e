#!/usr/bin/env bash
# Trains with GRPO on math: makes the environment if it is missing, then hands every argument to rlinf_lite.main_math.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: bash run_main_math.sh [config-name] [hydra overrides ...]

  config-name   a file in configs/, without .yaml; left out: the embedded default, a tiny model that learns sums on a CPU
  overrides     key=value for any key of the config (rlinf_lite/config.py says what each one means)

examples
  bash run_main_math.sh                                        train the embedded default, about a minute
  bash run_main_math.sh runner.max_steps=8                     the same, but only 8 steps
  bash run_main_math.sh qwen2.5-1.5b-grpo-fsdp                 another config
  bash run_main_math.sh runner.resume_dir=auto                 go on from the newest checkpoint that is intact
  bash run_main_math.sh runner.resume_dir=logs/NAME/checkpoints/global_step_50
                                                               go on from that one
  bash run_main_math.sh 'data.train_data_paths=[a.jsonl,b.jsonl]'
                                                               quotes keep brackets from the shell

Relative paths such as ./logs start where you are. A Ray cluster that `ray start --head` left running is used; without one a
local Ray is started. The environment is the active one if this checkout is installed in it, else .venv beside this script.
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
