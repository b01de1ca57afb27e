"""Transformers' checks of configs, without what they import: a second of processor time of each driver."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

_ACTIVATIONS = "transformers.activations"
_USUAL = frozenset({"gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"})


class _Activations(Mapping[str, Any]):
    """Activation functions by name, as in transformers; they are imported for an unusual name only."""

    def __contains__(self, name: object) -> bool:
        return name in _USUAL or name in _all()

    def __getitem__(self, name: str) -> Any:
        return _all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_all())

    def __len__(self) -> int:
        return len(_USUAL)  # transformers asks whether there are any


def _all() -> Mapping[str, Any]:
    from transformers.activations import ACT2FN

    functions: Mapping[str, Any] = ACT2FN
    return functions


def import_checks() -> None:
    """Import `transformers.utils.type_validators`, which config classes import.

    It needs the names of activation functions. Their module imports kernels, and with them `torch.distributed.tensor`,
    `torch._dynamo` and some 860 more, none of which the driver uses.
    """
    import transformers.video_utils

    if _ACTIVATIONS in sys.modules:
        return
    stand_in = ModuleType(_ACTIVATIONS)
    stand_in.ACT2FN = _Activations()  # type: ignore[attr-defined]
    sys.modules[_ACTIVATIONS] = stand_in
    try:
        import transformers.utils.type_validators  # noqa: F401
    except ImportError:
        pass  # another transformers, which checks in another way
    finally:
        del sys.modules[_ACTIVATIONS]
