"""The run: loop, progress, schedule, identity, resume."""
