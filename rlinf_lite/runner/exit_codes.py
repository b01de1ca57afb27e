"""What the exit code says to whoever started the driver. Imports nothing: it is needed before anything else."""

EXIT_USER_ERROR = 2
EXIT_WORKER_LOST = 3
EXIT_OUT_OF_TIME = 75
"""EX_TEMPFAIL: stopped before the end by ``runner.max_time``, SIGTERM, SIGUSR1 or a drained node, and saved; start
again with ``runner.resume_dir=auto``."""
EXIT_INTERRUPTED = 130
