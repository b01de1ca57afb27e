"""``python -m rlinf_lite.config``: prints config keys with their values, defaults and meanings; writes their page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rlinf_lite.config import docs
from rlinf_lite.config.schema import known_keys
from rlinf_lite.config.suggestions import nearest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "config.md"
LISTING = ROOT / "tests" / "unit" / "config_keys.txt"


def main(arguments: list[str]) -> int:
    """Print the keys that ``arguments`` name, or write the generated files; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m rlinf_lite.config", description="Prints config keys.")
    parser.add_argument("key", nargs="?", default="", help="a key or section; all of them if left out")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)} and the list of keys")
    options = parser.parse_args(arguments)
    if options.write:
        PAGE.write_text(docs.markdown(), encoding="utf-8")
        LISTING.write_text(docs.listing(), encoding="utf-8")
    elif found := docs.text(options.key):
        print(found)
    else:
        print(f"error: {options.key}: unknown key{nearest(options.key, known_keys())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
