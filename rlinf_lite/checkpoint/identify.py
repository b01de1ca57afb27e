"""What a path that the user gave is: a checkpoint, a directory of checkpoints, a run, or something to give instead."""

from __future__ import annotations

import os
import re
from pathlib import Path

from rlinf_lite.checkpoint import layout
from rlinf_lite.checkpoint.errors import NoCheckpoint, SectionMismatch
from rlinf_lite.checkpoint.storage import StoragePath, is_local, storage_path

RUN_CHECKPOINTS = "checkpoints"
"""The name of the directory in which a run keeps its checkpoints."""
RLINF, MEGATRON = "RLinf", "Megatron-LM or RLinf"
"""Who writes DCP files below `RLINF_DCP`, and who Megatron's layout."""
RLINF_DCP = "dcp_checkpoint"
"""Where RLinf keeps the DCP files, below ``actor/``."""
MEGATRON_TRACKER = "latest_checkpointed_iteration.txt"
"""The file in which Megatron keeps the number of its newest checkpoint."""
_CONVERTERS = "toolkits/ckpt_convertor"
_ITERATION = re.compile(r"iter_[0-9]{7,}|release")
_VERL_SHARD = re.compile(r"model_world_size_\d+_rank_\d+\.pt")


def located(text: str) -> StoragePath:
    """The path for ``text``; a local one is made absolute, so that it has a name and a parent."""
    path = storage_path(text)
    return Path(os.path.abspath(path)) if is_local(path) else path


def is_checkpoint(path: StoragePath) -> bool:
    """Whether ``path`` is one checkpoint by its name or its content, and not a directory of them."""
    return layout.step_of(path) is not None or (path / layout.MANIFEST).is_file()


def checkpoints_directory(path: StoragePath) -> StoragePath:
    """``path`` itself, or its ``checkpoints`` directory if it is the directory of a run.

    Raises:
        NoCheckpoint: there is no such directory.
    """
    if not path.is_dir():
        raise NoCheckpoint(f"{path}: no such directory")
    inside = path / RUN_CHECKPOINTS
    return inside if inside.is_dir() else path


def linked(path: StoragePath) -> StoragePath:
    """The target of a symbolic link such as ``latest``; any other path unchanged."""
    return path.resolve() if is_local(path) and path.is_symlink() else path


def instead_of(path: StoragePath) -> str | None:
    """What ``path`` is and what to give instead, as the end of a sentence; None if it is nothing that is known.

    Args:
        path: a directory without a manifest, or of another name than ``global_step_N``.
    """
    if not is_local(path) or not path.is_dir():
        return None
    if (path.parent / layout.MANIFEST).is_file():
        return f"is a part of a checkpoint; did you mean {path.parent}?"
    for root in (path / RUN_CHECKPOINTS, path):
        if found := [one for one in layout.committed(root) if (one / layout.MANIFEST).is_file()]:
            what = "holds checkpoints" if root == path else "is the directory of a run"
            return f"{what}; did you mean {found[0]}, its newest? (auto means the newest of the run that is started)"
    if _of_verl(path):
        return (
            "is a checkpoint of verl, whose optimizer state cannot be read here; make a Hugging Face directory of it "
            "with python -m verl.model_merger merge --backend fsdp, and start with that as actor.model.model_path"
        )
    if dcp := _of_rlinf(path):
        return (
            "is a checkpoint of RLinf, without a manifest.json; make one to resume from with "
            f"{_CONVERTERS}/convert_rlinf_to_dcp.py --dcp_path {dcp} --base_model ... --output_path ..., or of its "
            f"weights alone a model with {_CONVERTERS}/convert_dcp_to_hf.py"
        )
    if files := _of_megatron(path):
        return (
            "is a checkpoint in Megatron's layout, without a manifest.json; make one to resume from with "
            f"{_CONVERTERS}/convert_megatron_to_megatron.py --megatron_path {files} --base_model ... --output_path ... "
            "(convert_megatron_to_dcp.py for FSDP), or of its weights alone a model with convert_megatron_to_hf.py"
        )
    if (path / "config.json").is_file():
        return "is a Hugging Face directory; give it as actor.model.model_path"
    return None


def writer_of(path: StoragePath) -> str | None:
    """`RLINF` or `MEGATRON`, if another program's training state is in ``path``; else None."""
    if not path.is_dir() or any((one / layout.MANIFEST).is_file() for one in (path, path.parent, path.parent.parent)):
        return None
    for directory in (path, path / RLINF_DCP, path / layout.ACTOR / RLINF_DCP):
        if directory.name == RLINF_DCP and (directory / layout.METADATA).is_file():
            return RLINF
    return MEGATRON if _of_megatron(path) else None


def other_layout(section: StoragePath, *, wants_files: bool) -> SectionMismatch:
    """The error for a section in DCP shards where files of a layout of their own are wanted, or the other way round.

    Args:
        section: its directory in a checkpoint.
        wants_files: whether the state to be loaded is kept in such files.
    """
    held, wanted = "DCP shards", "Megatron's files"
    script = "convert_dcp_to_megatron.py --dcp_path"
    if not wants_files:
        held, wanted = wanted, held
        script = "convert_megatron_to_dcp.py --megatron_path"
    return SectionMismatch(
        f"{section}: holds {held}, and this trainer loads {wanted}: keep the run's actor.training_backend, or convert "
        f"it with python {_CONVERTERS}/{script} {section.parent} --output_path ..."
    )


def _of_verl(path: StoragePath) -> bool:
    return any(
        directory.is_dir() and any(_VERL_SHARD.fullmatch(file.name) for file in directory.iterdir())
        for directory in (path, path / layout.ACTOR)
    )


def _of_megatron(path: StoragePath) -> StoragePath | None:
    """The directory in ``path`` that holds Megatron's iterations; None if there is none."""
    for directory in (path, path / layout.ACTOR):
        if directory.is_dir() and any(_ITERATION.fullmatch(one.name) for one in directory.iterdir()):
            return directory
    return path if any(path.glob("mp_rank_*/model_optim_rng.pt")) else None


def _of_rlinf(path: StoragePath) -> StoragePath | None:
    """The directory of RLinf's DCP files in ``path``, or in its newest checkpoint; None if there is none."""
    steps = sorted((p for p in path.iterdir() if layout.step_of(p) is not None), key=lambda p: layout.step_of(p) or 0)
    for directory in (path, path / layout.ACTOR, *(step / layout.ACTOR for step in reversed(steps))):
        for dcp in (directory, directory / RLINF_DCP):
            if (dcp / ".metadata").is_file():
                return dcp
    return None
