"""Readers and writers of the files in a checkpoint; reading runs no code from the files."""
