"""A checkpoint in Megatron's layout (``ckpt_format: torch``), read tensor by tensor and resharded.

``iter_0000050/mp_rank_01/model_optim_rng.pt`` and ``distrib_optim.pt`` hold what tensor-parallel rank 1 has. Files of
Megatron-LM, of RLinf and of rlinf_lite are read alike, with the names of the local and of the Transformer Engine spec.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from rlinf_lite.checkpoint import DamagedCheckpoint, StateMismatch
from rlinf_lite.weights.megatron.architecture import Architecture
from rlinf_lite.weights.megatron.mapping import EMBEDDING, Partition, Weight
from rlinf_lite.weights.megatron.packing import slots

MODEL_FILE, OPTIMIZER_FILE = "model_optim_rng.pt", "distrib_optim.pt"
LATEST_FILE = "latest_checkpointed_iteration.txt"
PARTS = ("param", "exp_avg", "exp_avg_sq")
"""The flat tensors of the optimizer: float32 parameters, first and second moment."""
OURS = "rlinf_lite"
"""Key in `MODEL_FILE` of what Megatron's files have no place for. Its loader ignores it."""
_RANK_DIR = re.compile(r"(iter_\d{7,}|release)/mp_rank_(\d\d)([_\d]*)/(.+)")
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine's layers contain the norm before them."""


def rank_file(step: int, rank: int, name: str) -> str:
    """The path, within the section of a checkpoint, of a file of tensor-parallel rank ``rank``."""
    return f"iter_{step:07d}/mp_rank_{rank:02d}/{name}"


class MegatronFiles:
    """What all tensor-parallel ranks have written. Files are opened when they are needed, and stay open."""

    def __init__(self, names: Collection[str], read: Callable[[str], object], arch: Architecture) -> None:
        """
        Args:
            names: all files of the section.
            read: returns the content of one of them.
            arch: of the model that is expected.

        Raises:
            StateMismatch: they hold another model, or were written with a parallelism that is not read.
            DamagedCheckpoint: files are missing.
        """
        self._read, self._opened = read, dict[str, Any]()
        self._directory, self.size = _find_ranks(names)
        self.has_optimizer = f"{self._directory}/mp_rank_00/{OPTIMIZER_FILE}" in names
        """False for weights alone."""
        embedding = self.model_file(0).get("model", {}).get(EMBEDDING)
        if not isinstance(embedding, Tensor):
            raise StateMismatch(f"{self._directory}: {MODEL_FILE} holds no {EMBEDDING}")
        self.partition = Partition(arch=arch, size=self.size, padded_vocab_size=len(embedding) * self.size)
        self._orders = [self._check_model(rank) for rank in range(self.size)]

    def model_file(self, rank: int) -> Mapping[str, Any]:
        """The content of a rank's `MODEL_FILE`."""
        content = self._open(rank, MODEL_FILE)
        if not isinstance(content, Mapping):
            raise DamagedCheckpoint(f"{self._directory}/mp_rank_{rank:02d}/{MODEL_FILE} holds no mapping")
        return content

    def _open(self, rank: int, file: str) -> Any:
        name = f"{self._directory}/mp_rank_{rank:02d}/{file}"
        if name not in self._opened:
            self._opened[name] = self._read(name)
        return self._opened[name]

    def _check_model(self, rank: int) -> dict[str, str]:
        """The rank's parameters in the order of its file, which is that of its optimizer: our name -> its name."""
        held = {_local_name(name): name for name, value in self._model(rank).items() if isinstance(value, Tensor)}
        wanted = self.partition.shapes()
        problems = [f"missing: {name}" for name in wanted if name not in held]
        problems += [f"not in the model: {name}" for name in held if name not in wanted]
        for name in wanted.keys() & held.keys():
            if (shape := tuple(self._model(rank)[held[name]].shape)) != wanted[name]:
                problems.append(f"{name} is {list(shape)}, the model's is {list(wanted[name])}")
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise StateMismatch(
                f"{self._directory} of {self.size} tensor-parallel ranks is a checkpoint of another model: "
                f"{'; '.join(sorted(problems)[:5])}{more}"
            )
        return held

    def _model(self, rank: int) -> Mapping[str, Any]:
        model: Mapping[str, Any] = self.model_file(rank)["model"]
        return model

    def check_dtype(self, dtype: torch.dtype) -> None:
        """
        Raises:
            StateMismatch: the parameters have another type.
        """
        if (held := self._model(0)[self._orders[0][EMBEDDING]].dtype) != dtype:
            raise StateMismatch(f"{self._directory}: parameters are {held}, the model's are {dtype}")

    def parameter(self, weight: Weight, target: Partition, rank: int) -> Tensor:
        """A parameter as ``rank`` of another, or of the same, partition holds it; maybe a view of the file."""
        return self._as_held(weight, target, rank, lambda r: self._model(r)[self._orders[r][weight.name]])

    def optimizer(self, part: str, weight: Weight, target: Partition, rank: int) -> Tensor:
        """One of the `PARTS` of a parameter, as `parameter`: float32."""
        return self._as_held(weight, target, rank, lambda r: self._flat(r, part)[weight.name])

    def _as_held(self, weight: Weight, target: Partition, rank: int, of_rank: Callable[[int], Tensor]) -> Tensor:
        if target == self.partition:
            return of_rank(rank)
        whole = self.partition.join(weight, [of_rank(r) for r in range(self.size)])
        return target.shard(weight, [whole[name] for name in weight.sources], rank)

    def _flat(self, rank: int, part: str) -> dict[str, Tensor]:
        """Views of a flat tensor of a rank's optimizer, by our names."""
        shapes = self.partition.shapes()
        flat, places = self._buffer(rank)[part], slots({name: shapes[name] for name in self._orders[rank]})
        return {slot.name: flat[slot.start : slot.stop].view(shapes[slot.name]) for slot in places}

    def _buffer(self, rank: int) -> Mapping[str, Tensor]:
        """The only buffer of a rank's optimizer."""
        if not self.has_optimizer:
            raise StateMismatch(
                f"{self._directory}: holds weights alone; start from them with runner.resume_mode=weights"
            )
        content, where = self._open(rank, OPTIMIZER_FILE), f"{self._directory}/mp_rank_{rank:02d}/{OPTIMIZER_FILE}"
        if isinstance(content, list):
            raise StateMismatch(
                f"{where}: holds {len(content)} optimizers, as of a mixture of experts; only dense models"
            )
        buffers = content.get(0) if isinstance(content, Mapping) else None
        if not isinstance(buffers, Mapping) or len(buffers) != 1 or 1 in content:
            raise StateMismatch(f"{where} is not of one dense model: it must have one buffer, of one type")
        (buffer,) = buffers.values()
        shapes = self.partition.shapes()
        wanted = slots({name: shapes[name] for name in self._orders[rank]})[-1].stop
        for part in PARTS:
            flat = buffer.get(part)
            if not isinstance(flat, Tensor) or flat.dtype != torch.float32:
                raise DamagedCheckpoint(f"{where}: {part} is not a tensor of float32")
            if flat.shape != (wanted,):
                raise StateMismatch(
                    f"{where}: {part} has {flat.numel()} floats, the parameters take {wanted}; a checkpoint that was "
                    "written with overlap_grad_reduce has other gaps between them"
                )
        found: Mapping[str, Tensor] = buffer
        return found

    @property
    def num_optimizer_steps(self) -> int:
        """Steps that Adam has taken."""
        return int(self._of_groups("step"))

    @property
    def learning_rate(self) -> float:
        """Of the last step."""
        return float(self._of_groups("lr"))

    @property
    def grad_scaler(self) -> Mapping[str, Any]:
        """What a scaler of the loss has saved; empty if there was none, or a constant one."""
        found: Mapping[str, Any] = self.model_file(0).get("optimizer", {}).get("grad_scaler") or {}
        return found

    def _of_groups(self, key: str) -> Any:
        """What all parameter groups say."""
        groups = self.model_file(0).get("optimizer", {}).get("optimizer", {}).get("param_groups", [])
        values = {group.get(key) for group in groups}
        if len(values) != 1 or None in values:
            raise DamagedCheckpoint(f"{self._directory}: its parameter groups do not have one {key}, but {values}")
        return values.pop()


def _find_ranks(names: Collection[str]) -> tuple[str, int]:
    """The directory of the only iteration, and the number of tensor-parallel ranks."""
    found: dict[str, set[str]] = {}
    for match in filter(None, map(_RANK_DIR.fullmatch, names)):
        directory, rank, more, file = match.groups()
        if more:
            raise StateMismatch(
                f"{directory}/mp_rank_{rank}{more}: pipeline and expert parallelism are not supported; convert the "
                "checkpoint with Megatron-LM's tools to a pipeline_model_parallel_size of 1"
            )
        found.setdefault(directory, set()).add(f"{rank}/{file}")
    if len(found) != 1:
        raise StateMismatch(
            f"no checkpoint of Megatron's format torch: {len(found)} directories iter_N with mp_rank_00 in it, not one"
        )
    ((directory, files),) = found.items()
    size = len({file.partition("/")[0] for file in files})
    wanted_files = (MODEL_FILE, OPTIMIZER_FILE) if any(f.endswith(OPTIMIZER_FILE) for f in files) else (MODEL_FILE,)
    wanted = {f"{rank:02d}/{file}" for rank in range(size) for file in wanted_files}
    if missing := sorted(wanted - files):
        raise DamagedCheckpoint(f"{directory} lacks mp_rank_{missing[0]}")
    return directory, size


def _local_name(name: str) -> str:
    for fused, local in _FUSED_NORMS.items():
        if name.endswith(fused):
            return name.removesuffix(fused) + local
    return name
