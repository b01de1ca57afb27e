"""Processes of one machine: memory that they share, without a network between them."""
