"""``python -m rlinf_lite.checkpoint``: list, show, verify, compare, remove, prune and pin checkpoints."""

import sys

from rlinf_lite.checkpoint.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
