"""Which tensors of a DCP directory are the model's, by the names that rlinf_lite, RLinf or torchtitan give them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection

from rlinf_lite.checkpoint import StateMismatch
from rlinf_lite.checkpoint.storage import StoragePath
from rlinf_lite.weights.names import listed

PREFIXES = ("fsdp_checkpoint.model.", "app.model.", "model.")
"""What the names of the model's tensors begin with: in RLinf's checkpoints, where a whole application was saved as
``app`` (prime-rl, PyTorch's recipe), in ours."""
_UNPREFIXED = ("lm_head.weight", "output.weight")
"""At the top level only where a model's state dict has no prefix at all: saved by itself, or by torchtitan, which keeps
optimizer and train state beside it."""
_TRAINING_STATE = {
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
"""Top-level names of what is not a model, beside a model without a prefix."""
_OPTIMIZER_TENSOR = re.compile(
    r"(?:optim|optimizer|optimizers)\.state\.(?P<parameter>.+)\.(exp_avg|exp_avg_sq|max_exp_avg_sq|momentum_buffer|step)"
)
_OPTIMIZER_SUFFIX = re.compile(r"\.(exp_avg|exp_avg_sq|max_exp_avg_sq|momentum_buffer)$")
_MODEL_ROOTS = frozenset(
    ["model", "transformer", "gpt_neox", "lm_head", "output", "layers", "norm", "tok_embeddings", "freqs_cis"]
)
"""What the names of a causal LM begin with, in transformers and in torchtitan."""


def model_prefix(directory: StoragePath, names: Collection[str]) -> str:
    """What the names of the model's tensors begin with, found from the ``names`` of all tensors in ``directory``.

    Raises:
        StateMismatch: no prefix is known, or names without a prefix are ambiguous.
    """
    trained = {match["parameter"] for name in names if (match := _OPTIMIZER_TENSOR.fullmatch(name))}
    if any(name in names for name in _UNPREFIXED) or any(name in trained for name in names):
        _check_unprefixed(directory, names, trained)
        return ""
    prefix = next((known for known in PREFIXES if any(name.startswith(known) for name in names)), None)
    if prefix is None:
        groups = sorted({name.split(".")[0] for name in names})
        raise StateMismatch(
            f"{directory}: no tensor's name begins with {' or '.join(PREFIXES)}; its top-level groups are: "
            f"{', '.join(groups) or 'none'}"
        )
    return prefix


def best_prefix(held: Collection[str], expected: Collection[str]) -> str:
    """The prefix under which most of the ``expected`` names are ``held``; if none is, one under which anything is."""

    def fits(prefix: str) -> tuple[int, bool]:
        return sum(f"{prefix}{name}" in held for name in expected), any(name.startswith(prefix) for name in held)

    return max((*PREFIXES, ""), key=fits)


def of_model(name: str, prefix: str) -> bool:
    """Whether a tensor belongs to the model, whose names begin with ``prefix``."""
    return name.startswith(prefix) if prefix else name.split(".")[0] not in _TRAINING_STATE


def not_of_model(names: Collection[str], prefix: str) -> str:
    """What a directory holds beside the model, as top-level names and numbers of tensors; empty if nothing."""
    groups = Counter(name.split(".")[0] for name in names if not of_model(name, prefix))
    return ", ".join(f"{group} ({count} tensors)" for group, count in sorted(groups.items()))


def _check_unprefixed(directory: StoragePath, names: Collection[str], trained: Collection[str]) -> None:
    """Refuse names that may or may not be weights: without a prefix nothing else tells them apart."""
    kept = {name for name in names if of_model(name, "")}
    roots = {name.split(".")[0] for name in (*trained, *_UNPREFIXED) if name in kept} | _MODEL_ROOTS
    model_alone = len(kept) == len(names)
    ambiguous = sorted(
        name for name in kept if _OPTIMIZER_SUFFIX.search(name) or not (model_alone or name.split(".")[0] in roots)
    )
    if ambiguous:
        raise StateMismatch(
            f"{directory}: {listed(ambiguous, 3)}: neither known as weights nor as optimizer or training state, and "
            "names have no prefix here; save the model by itself, or below the key model"
        )
