"""Workers that start quickly: forked from a process that has imported what they need."""
