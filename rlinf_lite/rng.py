"""The RNG state of one process (python, numpy, torch, CUDA) as tensors, so that loading it unpickles nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection

import numpy as np
import torch

from rlinf_lite.counters import counter_hash

RngState = dict[str, torch.Tensor]
PREFIX = "rng."


def key(rank: int) -> str:
    """The key of one rank's RNG state. DCP keeps one value per key, so ranks must not share a key."""
    return f"{PREFIX}rank{rank}"


def same_devices(held: Collection[str], rank: int) -> bool:
    """Whether a checkpoint with the keys ``held`` has a CUDA RNG state if and only if this process has a GPU."""
    return (f"{key(rank)}.cuda" in held) == torch.cuda.is_available()


def capture() -> RngState:
    """The current RNG state of this process."""
    version, internal, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    rest = [numpy["state"]["pos"], numpy["has_gauss"]]
    state = {
        "python": torch.from_numpy(np.array([version, *internal], dtype=np.int64)),
        "python_gauss": torch.tensor(math.nan if gauss is None else gauss, dtype=torch.float64),
        "numpy": torch.from_numpy(np.concatenate([numpy["state"]["key"], rest]).astype(np.int64)),
        "numpy_gauss": torch.tensor(numpy["gauss"], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def check(state: RngState) -> None:
    """Check that `restore` would accept the state, without changing anything.

    Raises:
        ValueError: names the part that cannot be restored, and why.
    """
    trials: dict[str, Callable[[], object]] = {
        "python": lambda: random.Random().setstate(_python(state)),
        "numpy": lambda: np.random.RandomState().set_state(_numpy(state)),
        "torch": lambda: torch.Generator().set_state(state["torch"]),
    }
    if "cuda" in state:
        trials["cuda"] = lambda: torch.Generator("cuda").set_state(state["cuda"])
    for name, trial in trials.items():
        try:
            trial()
        except (ValueError, TypeError, OverflowError, RuntimeError) as error:
            raise ValueError(f"{name} cannot be restored ({str(error).splitlines()[0]})") from None


def restore(state: RngState) -> None:
    """Set the RNG state of this process to one that `capture` returned."""
    random.setstate(_python(state))
    np.random.set_state(_numpy(state))
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _python(state: RngState) -> tuple[int, tuple[int, ...], float | None]:
    version, *internal = state["python"].tolist()
    gauss = state["python_gauss"].item()
    return version, tuple(internal), None if math.isnan(gauss) else gauss


def _numpy(state: RngState) -> tuple[str, np.ndarray, int, int, float]:
    *words, position, has_gauss = state["numpy"].tolist()
    if not all(0 <= word < 2**32 for word in words) or not 0 <= position <= len(words) or has_gauss not in (0, 1):
        raise ValueError(f"words, position {position} or flag {has_gauss} out of range")
    return "MT19937", np.array(words, dtype=np.uint32), position, has_gauss, state["numpy_gauss"].item()


def reseed(*counters: int | str) -> None:
    """Derive the RNG state from ``counters``: (seed, step, rank) where there is none to restore."""
    bits = int(counter_hash("rng", *counters))
    random.seed(bits)
    np.random.seed(bits % 2**32)
    # As torch.manual_seed, which also formats a stack for each kind of device that is not there: half a millisecond.
    torch.default_generator.manual_seed(bits % 2**63)
    if torch.version.cuda is not None:
        torch.cuda.manual_seed_all(bits % 2**63)
