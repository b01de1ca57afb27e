#!/usr/bin/env bash
# Starts Ray on this node, as the head or as a worker, and returns when the node has joined the cluster.
# bash toolkits/cluster/start_ray.sh --help shows how to choose between the two.
set -euo pipefail

# shellcheck source=toolkits/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
use_environment
# Ray reads it when it is imported.
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
# use_environment sets these two.
# shellcheck disable=SC2154
exec "$python" "$repo_root/toolkits/cluster/start_ray.py" "$@"
