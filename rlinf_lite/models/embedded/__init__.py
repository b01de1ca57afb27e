"""Models that ship with the package, one directory each, and the scripts that make them."""
