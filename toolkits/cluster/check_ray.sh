#!/usr/bin/env bash
# Waits until the Ray cluster has N nodes and prints them: bash toolkits/cluster/check_ray.sh N
set -euo pipefail

# shellcheck source=toolkits/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
use_environment
# Ray reads it when it is imported.
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
# use_environment sets these two.
# shellcheck disable=SC2154
exec "$python" "$repo_root/toolkits/cluster/check_ray.py" "$@"
