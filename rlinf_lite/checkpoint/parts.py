"""What one rank writes of its section: a DCP shard, or files of the state's own layout. A save knows no more of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.storage import WriteResult

from rlinf_lite.checkpoint.file_state import Copied, FileState, Lazy
from rlinf_lite.checkpoint.formats.tensor_writer import TorchFile, own
from rlinf_lite.checkpoint.live import TensorReader
from rlinf_lite.checkpoint.manifest import FileRecord

SMALL_BYTES = 4096
"""Tensors up to this size (step counters) are copied at the start: they may change outside of the optimizer step."""
_FRAME_BYTES = 256
"""Room for the bytes around each tensor of a file."""

Create = Callable[[str, int], AbstractContextManager[Any]]
"""Opens a new file by its path in the section and its approximate size. It has ``write``, ``tell`` and ``record``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What a part has written."""

    files: dict[str, FileRecord]
    """By path in the section."""
    results: list[WriteResult] = field(default_factory=list)
    """Where each tensor is, for the section's ``.metadata``; empty if it has none."""


class SectionPart(Protocol):
    """One rank's part of a section, planned and not yet written."""

    @property
    def plan(self) -> object:
        """The same object as long as the same tensors would be written to the same files; None if there is no plan."""

    def num_bytes(self) -> list[int]:
        """The size of each tensor that is read while it is live, in the order in which they are read."""

    def tensor(self, index: int) -> torch.Tensor:
        """The live tensor ``index``."""

    def write(self, create: Create, live: TensorReader, halfway: Callable[[], None] = ...) -> Written:
        """Write this rank's files, each tensor read from ``live`` when it is to be written.

        Args:
            halfway: called in the middle.
        """

    def metadata(self, results: Sequence[list[WriteResult]]) -> bytes | None:
        """The content of the section's ``.metadata``, from the results of all its ranks; None if it has none."""


class FilesPart:
    """The files of a `FileState`. Tensors up to `SMALL_BYTES` are copied when it is made."""

    plan = None

    def __init__(self, contents: Mapping[str, object], *, live: bool = True) -> None:
        """
        Args:
            contents: what `FileState.files` returned.
            live: whether tensors may change after the fence; if not, all of them are like `Copied`.

        Raises:
            ValueError: a name leads out of the section, or is that of a DCP file.
            TypeError: a content cannot be saved.
        """
        self._may_change = live
        self._files: dict[str, TorchFile | bytes] = {}
        self._live: list[torch.Tensor] = []
        for name, content in sorted(contents.items()):
            self._files[_checked(name)] = content if isinstance(content, bytes) else self._pickled(name, content)

    @classmethod
    def of(cls, state: FileState, step: int) -> FilesPart:
        """Raises as the class, and whatever ``state`` raises."""
        return cls(state.files(step))

    def _pickled(self, name: str, content: object) -> TorchFile:
        try:
            file = TorchFile.of(content)
        except Exception as error:  # of whatever object was to be pickled
            raise TypeError(f"{name} cannot be saved: {error}") from None
        for index, tensor in enumerate(file.tensors):
            if not isinstance(tensor, torch.Tensor):
                continue
            if not self._may_change:
                file.tensors[index] = Copied(tensor)
            elif tensor.nbytes > SMALL_BYTES:
                self._live.append(tensor)
            else:
                file.tensors[index] = Copied(tensor.detach().clone())
        return file

    def num_bytes(self) -> list[int]:
        return [tensor.nbytes for tensor in self._live]

    def tensor(self, index: int) -> torch.Tensor:
        return self._live[index]

    def write(self, create: Create, live: TensorReader, halfway: Callable[[], None] = lambda: None) -> Written:
        written, order = {}, iter(range(len(self._live)))

        def reading(tensor: torch.Tensor | Copied | Lazy) -> AbstractContextManager[torch.Tensor]:
            if not isinstance(tensor, torch.Tensor):
                return own(tensor)
            index = next(order)
            if index == len(self._live) // 2:
                halfway()
            return live.reading(index)

        for name, content in self._files.items():
            with create(name, _size(content)) as stream:
                if isinstance(content, bytes):
                    stream.write(content)
                else:
                    content.write(stream, reading)
            written[name] = stream.record()
        return Written(files=written)

    def metadata(self, results: Sequence[list[WriteResult]]) -> None:
        return None


def _size(content: TorchFile | bytes) -> int:
    if isinstance(content, bytes):
        return len(content)
    return len(content.pickled) + content.num_bytes() + _FRAME_BYTES * (8 + len(content.tensors))


def _checked(name: str) -> str:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or str(pure) != name or not pure.name or not name.isprintable():
        raise ValueError(f"file {name!r}: give a path within the section")
    if pure.name == ".metadata" or pure.suffix == ".distcp":
        raise ValueError(f"file {name!r}: a name that DCP uses")
    return name
