"""What the sections are built from: their base class, the marker of neutral keys, and types that several keys share."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator, BaseModel, ConfigDict

from rlinf_lite import paths

T = TypeVar("T")


class Section(BaseModel):
    """A group of keys. A default may be an OmegaConf interpolation or ``MISSING``; `load.build` resolves them."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,  # `written` converts what users write; a value of another type here is a mistake in our code
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        defer_build=True,  # validators are built when a config is read: workers import this and validate nothing
    )


NEUTRAL = object()
"""Marks the type of a neutral key; see `Neutral`."""

Neutral: TypeAlias = Annotated[T, NEUTRAL]
"""The type of a key that cannot change the numbers of a run, such as where logs are written or how often it is saved.

All other keys are part of the run's identity: a resume that changes one is refused unless the key is allowed by name.
Paths are neutral, because the identity holds fingerprints of the data and models they lead to.
"""


def follows(key: str) -> Any:
    """A default that takes the value of another key."""
    return f"${{{key}}}"


MOST_COUNT = 2**31 - 1
"""Largest count: tokens, rows and steps are summed in 64 bits."""
MOST_SECONDS = 1e8
"""Three years. Python cannot wait for longer than about 9e9 seconds."""


def positive_or_off(value: T) -> T:
    """positive, or -1 for none"""
    if value == -1 or value > 0:  # type: ignore[operator]
        return value
    raise ValueError("must be positive, or -1 for none")


def unsupported(reason: str) -> AfterValidator:
    """A switch that RLinf's configs have and this project does not implement: only ``false`` is accepted."""

    def must_be_false(value: bool) -> bool:
        """false"""
        if value:
            raise ValueError(reason)
        return value

    return AfterValidator(must_be_false)


Count: TypeAlias = Annotated[int, Ge(1), Le(MOST_COUNT)]
CountOrZero: TypeAlias = Annotated[int, Ge(0), Le(MOST_COUNT)]
CountOrOff: TypeAlias = Annotated[int, Le(MOST_COUNT), AfterValidator(positive_or_off)]
Seconds: TypeAlias = Annotated[float, Le(MOST_SECONDS)]
Fraction: TypeAlias = Annotated[float, Ge(0), Le(1)]
PositiveFraction: TypeAlias = Annotated[float, Gt(0), Le(1)]
NonNegative: TypeAlias = Annotated[float, Ge(0)]
Seed: TypeAlias = Annotated[int, Ge(-(2**63)), Le(2**63 - 1)]
Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]
TYPE_NAMES: dict[Precision, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""What torch and vLLM call each `Precision`."""

PathText: TypeAlias = Annotated[str, AfterValidator(paths.expand)]
"""A path or URL; a leading ``~`` becomes the home directory."""
