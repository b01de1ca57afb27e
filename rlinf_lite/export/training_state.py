"""What a converted checkpoint keeps of its source beside tensors: counters, identity, and what it lacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlinf_lite.checkpoint import Manifest, read_data
from rlinf_lite.checkpoint.manifest import CONVERTED_FROM, LACKS_RNG, SAVE_ID, WRITTEN_BY
from rlinf_lite.checkpoint.storage import StoragePath


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """For `Checkpointer.save`."""

    step: int
    data: Mapping[str, Any]
    info: Mapping[str, Any]


def of_checkpoint(path: StoragePath, manifest: Manifest) -> TrainingState:
    """Of a checkpoint of rlinf_lite: everything but the RNG state of each rank."""
    info = {key: value for key, value in manifest.info.items() if key != SAVE_ID}
    return TrainingState(step=manifest.step, data=read_data(path), info={**info, LACKS_RNG: True})


def of_another_program(
    program: str, step: int, *, source: str, model_path: str, tied: Mapping[str, str]
) -> TrainingState:
    """Of a checkpoint that another program wrote: nothing but the step.

    Args:
        program: its name.
        source: the directory that it wrote.
        model_path: of the base model.
    """
    info = {
        LACKS_RNG: True,
        WRITTEN_BY: program,
        CONVERTED_FROM: source,
        "model_path": model_path,
        "tied": dict(tied),
    }
    return TrainingState(step=step, data={}, info=info)
