"""An environment of their own for the peers that rows are measured against, so that they need not suit this project's.

It is made once, in `.venv-peers` at the root of the checkout, with the torch and transformers that constraints.txt pins
and the newest release of each peer; removing the directory renews it.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIRECTORY = ROOT / ".venv-peers"
PEERS = ("trl", "accelerate", "datasets")
_PINNED = ("torch", "transformers", "numpy", "safetensors", "tokenizers", "huggingface_hub")
_COMPLETE = DIRECTORY / "complete"


def python() -> Path:
    """The interpreter of the environment, which is made if it is not there. Needs a package index then."""
    found = DIRECTORY / "bin" / "python"
    if not _COMPLETE.exists():
        print(f"installing {', '.join(PEERS)} into {DIRECTORY.name}, once: some minutes", file=sys.stderr, flush=True)
        venv.create(DIRECTORY, with_pip=True, clear=True)
        pinned = [
            line
            for line in (ROOT / "constraints.txt").read_text().splitlines()
            if line.partition("==")[0].lower() in _PINNED
        ]
        subprocess.run([found, "-m", "pip", "install", "--quiet", *pinned, *PEERS], check=True, stdout=sys.stderr)
        _COMPLETE.touch()
    return found


def version(peer: str) -> str:
    """``"trl 1.16.0"``: what is installed."""
    code = f"import importlib.metadata; print(importlib.metadata.version({peer!r}))"
    done = subprocess.run([python(), "-c", code], check=True, capture_output=True, text=True)
    return f"{peer} {done.stdout.strip()}"
