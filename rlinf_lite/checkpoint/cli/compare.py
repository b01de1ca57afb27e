"""Compares two checkpoints bit by bit, and reports where they differ and by how much.

Tensors are read in batches of bounded size, so that models larger than memory can be compared.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rlinf_lite.checkpoint import layout
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.formats.data_file import read_data
from rlinf_lite.checkpoint.formats.section_content import Form, SectionContent, content_of
from rlinf_lite.checkpoint.storage import StoragePath, in_use

BATCH_BYTES = 128 * 2**20
"""Bytes of tensors read at once from each checkpoint; at least one tensor is read."""
_SLICE = 2**22
"""Elements compared at once, which bounds the temporary memory."""
_NUMBERS = frozenset(
    {
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.complex64, torch.complex128, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8,
    }
)  # fmt: skip
_TEXT_WIDTH = 80

Forms = Mapping[str, Form | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorDifference:
    """A tensor with the same name, type and shape on both sides that is not bitwise identical."""

    name: str
    form: str
    """Such as ``float32 [16, 8]``."""
    num_elements: int
    num_different: int
    """Number of elements whose bits differ: a NaN equals itself, 0.0 and -0.0 differ."""
    largest_difference: float | None
    """Largest absolute difference, as float64. None if no two differing elements can be subtracted (NaN)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValueDifference:
    """A value that differs, as (shortened) text; None if it is missing on that side."""

    name: str
    a: str | None
    b: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    a: StoragePath
    b: StoragePath
    num_tensors: int
    """How many tensors both hold with the same type and shape; their bits were compared."""
    num_bytes: int
    """Bytes of those tensors."""
    tensors: tuple[TensorDifference, ...]
    forms: tuple[ValueDifference, ...]
    """Tensors that only one side holds, or that differ in type or shape."""
    values: tuple[ValueDifference, ...]
    """What the files of a section in a layout of its own hold beside tensors, where it differs."""
    data: tuple[ValueDifference, ...]
    """Differences in ``data.pt``."""
    manifest: tuple[ValueDifference, ...]
    """Differences in the manifest: step, world size, and what describes the run."""

    @property
    def same_tensors(self) -> bool:
        return not (self.tensors or self.forms)

    @property
    def same(self) -> bool:
        return self.same_tensors and not (self.values or self.data or self.manifest)


def compare(
    a: StoragePath, b: StoragePath, *, tensors_only: bool = False, batch_bytes: int = BATCH_BYTES
) -> Comparison:
    """Compare two checkpoints by the bits of their contents, however these are split into files.

    It does not verify the files against their manifests; `manifest.verify` does.

    Args:
        a: a checkpoint's directory.
        b: another one's.
        tensors_only: leave out ``data.pt`` and the manifest, which hold run ids and the like.
        batch_bytes: how many bytes to read at once from each.

    Raises:
        NoCheckpoint, DamagedCheckpoint, UnsafeCheckpoint: one of them is not a checkpoint, or cannot be read.
    """
    with in_use(a / layout.MANIFEST), in_use(b / layout.MANIFEST):
        about_a, about_b = manifests.read(a), manifests.read(b)
        side_a, side_b = _Side(a, about_a), _Side(b, about_b)
        forms_a, forms_b = side_a.forms(), side_b.forms()
        sizes = _comparable(forms_a, forms_b)
        return Comparison(
            a=a,
            b=b,
            num_tensors=len(sizes),
            num_bytes=sum(sizes.values()),
            tensors=tuple(_different_tensors(side_a, side_b, sizes, batch_bytes)),
            forms=tuple(_different_forms(forms_a, forms_b)),
            values=tuple(_different_values("", side_a.values(), side_b.values())),
            data=() if tensors_only else tuple(_different_values("", read_data(a), read_data(b))),
            manifest=() if tensors_only else tuple(_different_values("", _facts(about_a), _facts(about_b))),
        )


class _Side:
    """The tensors in all sections of one checkpoint: ``model.w`` of ``actor/``, ``critic/model.w`` of ``critic/``."""

    def __init__(self, path: StoragePath, manifest: manifests.Manifest) -> None:
        self._contents = {name: content_of(path, name, manifest) for name in manifest.ranks_of()}

    def forms(self) -> Forms:
        return self._named(lambda content: content.forms())

    def values(self) -> dict[str, Any]:
        """What the sections hold beside tensors."""
        return self._named(lambda content: content.values())

    def _named(self, ask: Callable[[SectionContent], dict[str, Any]]) -> dict[str, Any]:
        return {
            f"{_prefix(section)}{name}": value
            for section, content in self._contents.items()
            for name, value in ask(content).items()
        }

    def read(self, batch: set[str]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for section, content in self._contents.items():
            prefix = _prefix(section)
            held = content.forms()
            names = {name.removeprefix(prefix) for name in batch if name.startswith(prefix)} & held.keys()
            found |= {f"{prefix}{name}": tensor for name, tensor in content.read(names).items()}
        return found


def _prefix(section: str) -> str:
    return "" if section == layout.ACTOR else f"{section}/"


def _facts(manifest: manifests.Manifest) -> dict[str, Any]:
    info = {key: value for key, value in manifest.info.items() if key != manifests.SAVE_ID}
    sections = {"sections": manifest.sections} if manifest.sections else {}
    return {"step": manifest.step, "world_size": manifest.world_size, "info": info, **sections}


def _comparable(a: Forms, b: Forms) -> dict[str, int]:
    """Name and size in bytes of each tensor that both hold with the same type and shape."""
    return {name: form.num_bytes for name, form in sorted(a.items()) if form is not None and b.get(name) == form}


def _different_forms(a: Forms, b: Forms) -> Iterator[ValueDifference]:
    for name in sorted(a.keys() | b.keys()):
        form_a, form_b = (_text_of(side[name]) if name in side else None for side in (a, b))
        if form_a != form_b or form_a == _OBJECT:
            yield ValueDifference(name=name, a=form_a, b=form_b)


_OBJECT = "a pickled object, which is not opened"


def _text_of(form: Form | None) -> str:
    return _OBJECT if form is None else str(form)


def _different_tensors(a: _Side, b: _Side, sizes: Mapping[str, int], batch_bytes: int) -> Iterator[TensorDifference]:
    for batch in batches(sizes, batch_bytes):
        yield from _different_in_batch(a, b, batch)


def _different_in_batch(a: _Side, b: _Side, batch: set[str]) -> list[TensorDifference]:
    """Compare one batch; a separate function, so that its tensors are freed before the next batch is read."""
    ours, theirs = a.read(batch), b.read(batch)
    found = (tensor_difference(name, tensor, theirs[name]) for name, tensor in ours.items())
    return [difference for difference in found if difference is not None]


def batches(sizes: Mapping[str, int], batch_bytes: int) -> Iterator[set[str]]:
    """Group names into batches of at most ``batch_bytes``, or of one tensor if that is larger."""
    batch: set[str] = set()
    taken = 0
    for name, size in sizes.items():
        if batch and taken + size > batch_bytes:
            yield batch
            batch, taken = set(), 0
        batch.add(name)
        taken += size
    if batch:
        yield batch


def tensor_difference(name: str, a: torch.Tensor, b: torch.Tensor) -> TensorDifference | None:
    """How two plain tensors of the same type and shape differ, or None if all bits are the same."""
    num_different, largest = 0, None
    for start in range(0, a.numel(), _SLICE):
        piece_a, piece_b = a.reshape(-1)[start : start + _SLICE], b.reshape(-1)[start : start + _SLICE]
        if torch.equal(_bytes(piece_a), _bytes(piece_b)):
            continue
        different = (_bytes(piece_a) != _bytes(piece_b)).reshape(len(piece_a), -1).any(dim=1)
        num_different += int(different.sum())
        apart = _distance(piece_a[different], piece_b[different]) if a.dtype in _NUMBERS else None
        largest = apart if largest is None else max(largest, apart or 0.0)
    if num_different == 0:
        return None
    return TensorDifference(
        name=name,
        form=str(Form(a.dtype, a.shape)),
        num_elements=a.numel(),
        num_different=num_different,
        largest_difference=largest,
    )


def _bytes(flat: torch.Tensor) -> torch.Tensor:
    return flat.view(torch.uint8)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float | None:
    wide = torch.complex128 if a.is_complex() else torch.float64
    apart = (a.to(wide) - b.to(wide)).abs()
    numbers = apart[~apart.isnan()]
    return numbers.max().item() if len(numbers) else None


def _different_values(name: str, a: Any, b: Any) -> Iterator[ValueDifference]:
    """The leaves of nested dicts and sequences that differ in type or bits."""
    if type(a) is not type(b):
        yield ValueDifference(name=name, a=_text(a), b=_text(b))
    elif isinstance(a, Mapping):
        yield from _different_items(f"{name}." if name else "", a, b)
    elif isinstance(a, list | tuple) and len(a) == len(b):
        yield from _different_items(f"{name}.", dict(enumerate(a)), dict(enumerate(b)))
    elif isinstance(a, torch.Tensor):
        yield from _different_data_tensors(name, a, b)
    elif isinstance(a, list | tuple) or not _same(a, b):
        yield ValueDifference(name=name, a=_text(a), b=_text(b))


def _different_items(prefix: str, a: Mapping[Any, Any], b: Mapping[Any, Any]) -> Iterator[ValueDifference]:
    for key in sorted(a.keys() | b.keys(), key=str):
        if key in a and key in b:
            yield from _different_values(f"{prefix}{key}", a[key], b[key])
        else:
            text_a, text_b = _text(a[key]) if key in a else None, _text(b[key]) if key in b else None
            yield ValueDifference(name=f"{prefix}{key}", a=text_a, b=text_b)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    return bool(a == b)


def _different_data_tensors(name: str, a: torch.Tensor, b: torch.Tensor) -> Iterator[ValueDifference]:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        yield ValueDifference(name=name, a=_text(a), b=_text(b))
    elif (difference := tensor_difference(name, a.contiguous(), b.contiguous())) is not None:
        count = f"{difference.num_different} of {difference.num_elements} elements differ"
        yield ValueDifference(name=name, a=_text(a), b=f"{_text(b)} ({count})")


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"tensor {Form(value.dtype, value.shape)}"
    text = repr(value)
    return text if len(text) <= _TEXT_WIDTH else f"{text[: _TEXT_WIDTH - 3]}..."
