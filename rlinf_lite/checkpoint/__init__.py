"""Checkpoints: tensors, ranks, files, bytes. Knows no RL, Ray, Hydra, wandb, or model."""

from rlinf_lite.checkpoint.checkpointer import Checkpointer, LoadReport, SaveReport
from rlinf_lite.checkpoint.data_file import read_data
from rlinf_lite.checkpoint.digest import state_digest
from rlinf_lite.checkpoint.errors import (
    CheckpointError,
    DamagedCheckpoint,
    NoCheckpoint,
    SaveError,
    StateMismatch,
    UnsafeCheckpoint,
    WouldStartFresh,
)
from rlinf_lite.checkpoint.manifest import Manifest
from rlinf_lite.checkpoint.select import Selection, select
from rlinf_lite.checkpoint.state import flatten

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "DamagedCheckpoint",
    "LoadReport",
    "Manifest",
    "NoCheckpoint",
    "SaveError",
    "SaveReport",
    "Selection",
    "StateMismatch",
    "UnsafeCheckpoint",
    "WouldStartFresh",
    "flatten",
    "read_data",
    "select",
    "state_digest",
]
