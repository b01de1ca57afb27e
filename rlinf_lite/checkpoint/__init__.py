"""Distributed checkpoints of any torch state: saved in the background, verified, and never half written.

Knows tensors, ranks and files; imports neither Ray, Hydra nor wandb, and knows nothing of models or RL.
"""

from rlinf_lite.checkpoint.candidates import Candidates
from rlinf_lite.checkpoint.checkpointer import Checkpointer
from rlinf_lite.checkpoint.digest import state_digest
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
from rlinf_lite.checkpoint.loading import LoadReport
from rlinf_lite.checkpoint.manifest import Manifest
from rlinf_lite.checkpoint.memory.replica import MemoryCheckpoints, Replica
from rlinf_lite.checkpoint.retention import KeepBest, Retention
from rlinf_lite.checkpoint.saving import SaveReport
from rlinf_lite.checkpoint.select import Selection, select
from rlinf_lite.checkpoint.state import flatten
from rlinf_lite.checkpoint.torch_api.manager import CheckpointManager

__all__ = [
    "Candidates",
    "CheckpointError",
    "CheckpointManager",
    "Checkpointer",
    "DamagedCheckpoint",
    "KeepBest",
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
