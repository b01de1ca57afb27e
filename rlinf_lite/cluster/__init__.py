"""The only package that imports Ray: the session, the groups of workers, weight transfer, and errors."""

import os

# Ray reads these when it is imported or started.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")  # WorkerLost reports it
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else each worker prints a FutureWarning
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets every other program of the machine go first
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # idle workers would take the cores that ours need
