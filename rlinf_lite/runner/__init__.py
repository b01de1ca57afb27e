"""The steps of a run: loop, progress, schedule, saving, metrics, and requests to stop."""
