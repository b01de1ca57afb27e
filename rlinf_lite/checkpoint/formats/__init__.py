"""File formats of a checkpoint, read so that nothing in them runs."""
