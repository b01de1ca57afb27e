"""Models that ship with the package, one folder each, and the scripts that make them."""
