"""Reads and writes ``wandb_state.json``: the id of the wandb run and its last recorded step.

The file lies beside ``metrics.jsonl`` and stays if all checkpoints are deleted.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rlinf_lite.durable import replace_text
from rlinf_lite.observability.notices import log_line

FILE_NAME = "wandb_state.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class WandbState:
    run_id: str
    last_step: int
    """Steps up to this one are known to be recorded; later ones may be."""


def read_state(log_path: Path) -> WandbState | None:
    """The state; None if there is no such file or (with a log line) if it is damaged."""
    path = log_path / FILE_NAME
    if not path.exists():
        return None
    try:
        held = json.loads(path.read_bytes())
    except ValueError:
        held = None
    match held:
        case {"run_id": str(run_id), "last_step": int(last_step)} if run_id:
            return WandbState(run_id=run_id, last_step=last_step)
    log_line(f"!! wandb: {path} is damaged and is ignored")
    return None


def write_state(log_path: Path, state: WandbState) -> None:
    """Replace the file at once: after a kill it is the old one or the new one."""
    replace_text(log_path / FILE_NAME, json.dumps(asdict(state)))
