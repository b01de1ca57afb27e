#!/usr/bin/env bash
# Starts Ray on this node, as the head or as one of the others, and returns when the node is part of the cluster.
# bash toolkits/cluster/start_ray.sh --help says how it is told which of the two this node is.
set -euo pipefail

# shellcheck source=toolkits/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
use_environment
# Read when Ray is imported.
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
# use_environment leaves these two.
# shellcheck disable=SC2154
exec "$python" "$repo_root/toolkits/cluster/start_ray.py" "$@"
