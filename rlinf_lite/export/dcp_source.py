"""Where the model's tensors are in what a user calls a checkpoint, and reading them, one at a time if need be.

Knows checkpoints of rlinf_lite and of RLinf, and plain DCP directories of a model's state dict. Nothing is unpickled.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rlinf_lite.checkpoint import Manifest, NoCheckpoint, StateMismatch, layout
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.formats.dcp_reader import ShardReader, check_size
from rlinf_lite.checkpoint.mistaken import instead_of
from rlinf_lite.checkpoint.storage import StoragePath, in_use

PREFIXES = ("fsdp_checkpoint.model.", "app.model.", "model.")
"""What the names of model tensors begin with: in RLinf's checkpoints, where a whole application was saved as ``app``
(prime-rl, PyTorch's recipe), in ours."""
BARE = ("lm_head.weight", "output.weight")
"""At the top level only where a model's state dict has no prefix at all: saved by itself, or by torchtitan, which keeps
optimizer and train state beside it."""
STATE = {
    "optim",
    "optimizer",
    "optimizers",
    "lr_scheduler",
    "lr_schedulers",
    "scheduler",
    "dataloader",
    "data_loader",
    "train_state",
    "trainer_state",
    "progress",
    "rng",
    "rng_state",
    "grad_scaler",
    "scaler",
    "extra_state",
    "ema",
    "num_updates",
    "step",
    "epoch",
}
"""Top-level names of what is no model, beside one without a prefix."""
_MOMENT = re.compile(
    r"(?:optim|optimizer|optimizers)\.state\.(?P<parameter>.+)\.(exp_avg|exp_avg_sq|max_exp_avg_sq|momentum_buffer|step)"
)
_MOMENT_NAME = re.compile(r"\.(exp_avg|exp_avg_sq|max_exp_avg_sq|momentum_buffer)$")
_ROOTS = frozenset(
    ["model", "transformer", "gpt_neox", "lm_head", "output", "layers", "norm", "tok_embeddings", "freqs_cis"]
)
"""What the names of a causal LM begin with, in transformers and in torchtitan."""
RLINF_FOLDER = "dcp_checkpoint"
DCP_PATH_HELP = (
    f"a global_step_N directory, its actor directory, RLinf's actor/{RLINF_FOLDER}, or any DCP directory of a model"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Located:
    directory: StoragePath
    """The DCP directory."""
    manifest: Manifest | None
    """Of a checkpoint of ours."""

    @property
    def tied(self) -> dict[str, str]:
        """Names that a checkpoint of ours holds under another name (alias -> name)."""
        return dict(self.manifest.info.get("tied", {})) if self.manifest else {}


@contextmanager
def located(path: StoragePath, verify: str = "full") -> Iterator[Located]:
    """The DCP directory that ``path`` means, kept from being deleted meanwhile. A checkpoint of ours is verified first.

    Raises:
        NoCheckpoint, DamagedCheckpoint: ``path`` is none of what can be converted, or does not verify.
    """
    if not path.is_dir():
        raise NoCheckpoint(f"--dcp_path {path}: no such directory")
    checkpoint = path.parent if _is_actor_directory_of_ours(path) else path
    if (checkpoint / layout.MANIFEST).exists() or _holds_shards(checkpoint / layout.ACTOR):
        with in_use(checkpoint / layout.MANIFEST):
            manifest = manifests.read_verified(checkpoint, verify)
            yield Located(directory=checkpoint / layout.ACTOR, manifest=manifest)
        return
    for directory in (path, path / RLINF_FOLDER, path / layout.ACTOR / RLINF_FOLDER):
        if _holds_shards(directory):
            yield Located(directory=directory, manifest=None)
            return
    if hint := instead_of(path):
        raise NoCheckpoint(f"--dcp_path {path}: {hint}")
    raise NoCheckpoint(
        f"--dcp_path {path}: no checkpoint there; give a global_step_N directory, its {layout.ACTOR} directory, "
        f"or RLinf's {layout.ACTOR}/{RLINF_FOLDER}"
    )


def _is_actor_directory_of_ours(path: StoragePath) -> bool:
    of_checkpoint = path.parent.name.startswith("global_step_") or (path.parent / layout.MANIFEST).exists()
    return path.name == layout.ACTOR and _holds_shards(path) and of_checkpoint


def _holds_shards(directory: StoragePath) -> bool:
    return (directory / ".metadata").is_file()


def model_prefix(directory: StoragePath, names: Collection[str]) -> str:
    """What the names of the model's tensors begin with, told from the ``names`` of all.

    Raises:
        StateMismatch: none is known.
    """
    trained = {match["parameter"] for name in names if (match := _MOMENT.fullmatch(name))}
    if any(name in names for name in BARE) or any(name in trained for name in names):
        _check_bare(directory, names, trained)
        return ""
    prefix = next((known for known in PREFIXES if any(name.startswith(known) for name in names)), None)
    if prefix is None:
        groups = sorted({name.split(".")[0] for name in names})
        raise StateMismatch(
            f"{directory}: no tensor's name begins with {' or '.join(PREFIXES)}; its top-level groups are: "
            f"{', '.join(groups) or 'none'}"
        )
    return prefix


def of_model(name: str, prefix: str) -> bool:
    """Whether the tensor of that name belongs to the model, whose names begin with ``prefix``."""
    return name.startswith(prefix) if prefix else name.split(".")[0] not in STATE


def left_out(names: Collection[str], prefix: str) -> str:
    """What of a directory is not in the model, by top-level name and number of tensors; empty if nothing is."""
    groups = Counter(name.split(".")[0] for name in names if not of_model(name, prefix))
    return ", ".join(f"{group} ({count} tensors)" for group, count in sorted(groups.items()))


def _check_bare(directory: StoragePath, names: Collection[str], trained: Collection[str]) -> None:
    """Refuse what may be a weight, or may be not: beside bare names nothing else tells them apart."""
    kept = {name for name in names if of_model(name, "")}
    roots = {name.split(".")[0] for name in (*trained, *BARE) if name in kept} | _ROOTS
    alone = len(kept) == len(names)
    unsure = sorted(name for name in kept if _MOMENT_NAME.search(name) or not (alone or name.split(".")[0] in roots))
    if unsure:
        raise StateMismatch(
            f"{directory}: {some(unsure, 3)}: neither known as weights nor as optimizer or training state, and names "
            "have no prefix here; save the model by itself, or below the key model"
        )


class DcpModel:
    """The model in a DCP directory: its tensors by their names in the model, read one at a time."""

    def __init__(self, directory: StoragePath, expected: Collection[str]) -> None:
        """
        Args:
            expected: names in the model; what they begin with in the directory is told from them.
        """
        self.directory = directory
        self._reader = ShardReader(directory)
        held = {
            name: entry
            for name, entry in self._reader.metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._prefix = _best_prefix(held, expected)
        self.entries: dict[str, TensorStorageMetadata] = {
            name.removeprefix(self._prefix): entry for name, entry in held.items() if of_model(name, self._prefix)
        }
        check_size(directory, self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.entries[name].size)

    def dtype(self, name: str) -> torch.dtype:
        return self.entries[name].properties.dtype

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor, put together from all shards, in CPU memory.

        Raises:
            UnsafeCheckpoint, DamagedCheckpoint: its bytes are no tensor, or cannot be read.
        """
        tensors = {f"{self._prefix}{name}": torch.empty(self.shape(name), dtype=self.dtype(name))}
        self._reader.read(tensors)
        return tensors.popitem()[1]


def _best_prefix(held: Collection[str], expected: Collection[str]) -> str:
    """Under which most of the ``expected`` are ``held``; if none are, one under which there is anything."""

    def fits(prefix: str) -> tuple[int, bool]:
        return sum(f"{prefix}{name}" in held for name in expected), any(name.startswith(prefix) for name in held)

    return max((*PREFIXES, ""), key=fits)


def check_model(
    source: DcpModel, shapes: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str], tied: Mapping[str, str]
) -> None:
    """Compare what a DCP directory holds with what the base model is made of.

    Args:
        shapes: of every tensor of the base model, by its name.
        aliases: the base model's further names for some of them (alias -> name).
        tied: the same of the model that was trained.

    Raises:
        StateMismatch: lists what is missing, extra, or of another shape, by name; or names a tie that the two
            models do not share.
    """
    held = source.entries.keys()
    missing = [f"{name}{_why(name, tied)}" for name in shapes if name not in held]
    extra = sorted(name for name in held if name not in shapes and name not in aliases)
    other = [
        f"{name} is {list(source.shape(name))}, the base model's is {list(wanted)}"
        for name in sorted(held)
        if (wanted := shapes.get(aliases.get(name, name))) is not None and source.shape(name) != wanted
    ]
    problems = [f"missing: {some(missing)}"] * bool(missing) + [f"not in the base model: {some(extra)}"] * bool(extra)
    problems += [some(other)] * bool(other)
    if problems:
        raise StateMismatch(
            f"{source.directory} is a checkpoint of another model than --base_model: {'; '.join(problems)}"
        )
    for alias, name in aliases.items():
        if alias in held and not torch.equal(source.read(alias), source.read(name)):
            raise StateMismatch(
                f"{source.directory}: {alias} differs from {name}, which the base model ties it to; "
                "give a base model whose config.json says tie_word_embeddings: false"
            )


def _why(name: str, tied: Mapping[str, str]) -> str:
    return f" (tied to {tied[name]} in the checkpoint, but not in the base model)" if name in tied else ""


def some(names: Sequence[str], most: int = 10) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
