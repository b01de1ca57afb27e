"""Fingerprint of a set of problems: sha256 over what the model sees and what its responses are graded by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlinf_lite.types import Problem

_BUFFER_BYTES = 1 << 20


class Fingerprint:
    """sha256 over prompts, their token ids, answers and (``with_metadata``) metadata, in order."""

    def __init__(self, *, with_metadata: bool) -> None:
        self._digest, self._with_metadata = hashlib.sha256(), with_metadata
        self._buffer = bytearray()
        self._decimals: list[str] = []

    def add(self, prompt: bytes, answer: bytes, ids: Sequence[int], metadata: Mapping[str, Any]) -> None:
        """Add a problem; ``prompt`` and ``answer`` are in UTF-8."""
        listed = self._listed(ids)
        self._buffer += b"%d:%b%d:%b%d:%b" % (len(prompt), prompt, len(answer), answer, len(listed), listed)
        if self._with_metadata:
            text = canonical(metadata).encode("utf-8")
            self._buffer += b"%d:%b" % (len(text), text)
        if len(self._buffer) >= _BUFFER_BYTES:
            self._flush()

    def hexdigest(self) -> str:
        self._flush()
        return self._digest.hexdigest()

    def _flush(self) -> None:
        self._digest.update(self._buffer)
        self._buffer = bytearray()

    def _listed(self, ids: Sequence[int]) -> bytes:
        """``b"1,5,12"``, from a table of decimals: formatting each id takes a third of the time to load short rows."""
        try:
            return ",".join(map(self._decimals.__getitem__, ids)).encode()
        except IndexError:
            self._decimals += map(str, range(len(self._decimals), max(ids) + 1))
            return ",".join(map(self._decimals.__getitem__, ids)).encode()


def fingerprint(problems: Iterable[Problem], *, with_metadata: bool = False) -> str:
    """sha256 (hex) over what the model sees and is graded by, in order; problem ids and sources do not count."""
    found = Fingerprint(with_metadata=with_metadata)
    for problem in problems:
        found.add(problem.prompt.encode(), problem.answer.encode(), problem.prompt_ids, problem.metadata)
    return found.hexdigest()


def canonical(metadata: Mapping[str, Any]) -> str:
    """The same JSON text for equal values. Values that JSON does not support are replaced by their ``str``."""
    return json.dumps(metadata, sort_keys=True, default=str)
