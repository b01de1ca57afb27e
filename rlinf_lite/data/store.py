"""Stores problems as columns: a few large buffers take a fraction of the memory of one Python object per row."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from rlinf_lite.data.rows import display_name
from rlinf_lite.types import Problem


class ProblemStore(Sequence[Problem]):
    """A sequence of problems that makes each `Problem` on access. ``store[i].problem_id == i``."""

    def __init__(self) -> None:
        self._prompts, self._answers, self._ids = _Texts(), _Texts(), array("i")
        self._ids_end = array("q", [0])
        self._paths: dict[str, int] = {}
        self._names: list[str] = []
        """As messages say them, of each path."""
        self._path, self._line = array("i"), array("q")
        self._metadata: list[Mapping[str, Any]] | None = None

    def append(
        self, prompt: bytes, answer: bytes, ids: list[int], *, path: str, line: int, metadata: Mapping[str, Any]
    ) -> None:
        """Add a problem.

        Args:
            prompt, answer: in UTF-8.
            ids: token ids of the prompt.
            path, line: where the row comes from; the path as configured.
        """
        if metadata and self._metadata is None:
            self._metadata = [{}] * len(self)
        if self._metadata is not None:
            self._metadata.append(metadata)
        self._prompts.append(prompt)
        self._answers.append(answer)
        self._ids.fromlist(ids)
        self._ids_end.append(len(self._ids))
        if path not in self._paths:
            self._paths[path] = len(self._names)
            self._names.append(display_name(path))
        self._path.append(self._paths[path])
        self._line.append(line)

    @property
    def max_token_id(self) -> int:
        """The largest token id in any prompt, -1 if there are no problems."""
        return int(np.frombuffer(self._ids, dtype=np.intc).max(initial=-1))

    def __len__(self) -> int:
        return len(self._line)

    @overload
    def __getitem__(self, index: int) -> Problem: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Problem]: ...

    def __getitem__(self, index: int | slice) -> Problem | Sequence[Problem]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        problem_id = range(len(self))[index]
        name = self._names[self._path[problem_id]]
        return Problem(
            problem_id=problem_id,
            prompt=self._prompts[problem_id],
            answer=self._answers[problem_id],
            prompt_ids=tuple(self._ids[self._ids_end[problem_id] : self._ids_end[problem_id + 1]]),
            source=f"{name}:{self._line[problem_id]}",
            metadata={} if self._metadata is None else self._metadata[problem_id],
        )

    def __iter__(self) -> Iterator[Problem]:
        return map(self.__getitem__, range(len(self)))


class _Texts:
    """Texts in one buffer, as UTF-8."""

    def __init__(self) -> None:
        self._bytes, self._end = bytearray(), array("q", [0])

    def append(self, text: bytes) -> None:
        self._bytes += text
        self._end.append(len(self._bytes))

    def __getitem__(self, index: int) -> str:
        return self._bytes[self._end[index] : self._end[index + 1]].decode("utf-8")
