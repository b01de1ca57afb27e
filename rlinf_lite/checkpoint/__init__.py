"""Distributed checkpoints of any torch state: saved in the background, verified, and never half written.

Knows tensors, ranks and files; imports neither Ray, Hydra nor wandb, and knows nothing of models or RL.
"""

import importlib
from typing import TYPE_CHECKING, Any

from rlinf_lite.checkpoint.candidates import Candidates
from rlinf_lite.checkpoint.errors import (
    CheckpointError,
    DamagedCheckpoint,
    NoCheckpoint,
    RankSilent,
    SaveError,
    SectionMismatch,
    StateMismatch,
    UnsafeCheckpoint,
    WouldStartFresh,
)
from rlinf_lite.checkpoint.formats.data_file import read_data
from rlinf_lite.checkpoint.manifest import Manifest
from rlinf_lite.checkpoint.reports import LoadReport, SaveReport
from rlinf_lite.checkpoint.retention import KeepBest, Retention
from rlinf_lite.checkpoint.select import Selection, select

if TYPE_CHECKING:
    from rlinf_lite.checkpoint.checkpointer import Checkpointer
    from rlinf_lite.checkpoint.digest import state_digest
    from rlinf_lite.checkpoint.file_state import Copied, FileState, Lazy
    from rlinf_lite.checkpoint.memory.replica import MemoryCheckpoints, Replica
    from rlinf_lite.checkpoint.state import flatten
    from rlinf_lite.checkpoint.torch_api.manager import CheckpointManager

__all__ = [
    "Candidates",
    "CheckpointError",
    "CheckpointManager",
    "Checkpointer",
    "Copied",
    "DamagedCheckpoint",
    "FileState",
    "KeepBest",
    "Lazy",
    "LoadReport",
    "Manifest",
    "MemoryCheckpoints",
    "NoCheckpoint",
    "RankSilent",
    "Replica",
    "Retention",
    "SaveError",
    "SaveReport",
    "SectionMismatch",
    "Selection",
    "StateMismatch",
    "UnsafeCheckpoint",
    "WouldStartFresh",
    "flatten",
    "read_data",
    "select",
    "state_digest",
]

_MODULES_OF_RANKS = {
    "CheckpointManager": "torch_api.manager",
    "Checkpointer": "checkpointer",
    "Copied": "file_state",
    "FileState": "file_state",
    "Lazy": "file_state",
    "MemoryCheckpoints": "memory.replica",
    "Replica": "memory.replica",
    "flatten": "state",
    "state_digest": "digest",
}


def __getattr__(name: str) -> Any:
    """Import what only ranks use when it is used: it needs torch.distributed, a second of imports."""
    if name not in _MODULES_OF_RANKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES_OF_RANKS[name]}"), name)
