"""Starting a run, resuming it, and repairing it when a process dies."""
