"""Parses a JSON array element by element, without holding the whole array in memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from rlinf_lite.data.errors import DataError, explain_json

_REMEDY = "the file must hold one JSON array of objects"
_PIECE_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")


def elements(blocks: Iterable[bytes], path: str) -> Iterator[tuple[Any, str]]:
    """Yield each element of the array with its JSON text.

    Args:
        blocks: the bytes of the file, in blocks of any size.
        path: for messages.

    Raises:
        DataError: the file is not one JSON array in UTF-8. Names line and column.
    """
    text = _Text(blocks, path)
    text.expect("[", "Expecting value")
    if text.next_is("]"):
        text.end()
        return
    while True:
        yield text.element()
        if text.next_is("]"):
            text.end()
            return
        text.expect(",", "Expecting ',' delimiter")


class _Text:
    """A moving window over the text: parsed text is dropped, and more is read if an element does not end in it."""

    def __init__(self, blocks: Iterable[bytes], path: str) -> None:
        self._pieces, self._path = _pieces(blocks, path), path
        self._window, self._at, self._is_whole = "", 0, False
        self._line, self._column = 1, 0
        """Where the window starts in the file: the 1-based line, and the characters before it in that line."""

    def skip_whitespace(self) -> None:
        while True:
            match = _SPACE.match(self._window, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._window) or not self._read(1):
                return

    def next_is(self, sign: str) -> bool:
        """Whether ``sign`` comes next, after white space. If so, move past it."""
        self.skip_whitespace()
        found = self._window.startswith(sign, self._at)
        self._at += len(sign) if found else 0
        return found

    def expect(self, sign: str, complaint: str) -> None:
        if not self.next_is(sign):
            self._fail(complaint, self._at)

    def element(self) -> tuple[Any, str]:
        """Parse the next element; returns it with its JSON text."""
        self.skip_whitespace()
        more = _PIECE_BYTES
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._window, self._at)
            except json.JSONDecodeError as error:
                # The element may continue beyond the window. Read twice as much each time, so that parsing again
                # stays cheap.
                ahead = error.pos - self._at
                if self._read(more):
                    more *= 2
                    continue
                self._fail(error.msg, self._at + ahead)
            except (ValueError, RecursionError) as error:
                raise DataError(explain_json(error, self._path, _REMEDY)) from None
            # A number at the end of the window may continue beyond it.
            if end < len(self._window) or not self._read(more):
                text = self._window[self._at : end]
                self._at = end
                return value, text

    def end(self) -> None:
        self.skip_whitespace()
        if self._at < len(self._window):
            self._fail("Extra data", self._at)

    def _read(self, num_characters: int) -> bool:
        """Read more text into the window; returns whether there was more."""
        if self._is_whole:
            return False
        used = self._window[: self._at]
        self._line += used.count("\n")
        self._column = len(used) - used.rfind("\n") - 1 if "\n" in used else self._column + len(used)
        parts, num_read = [self._window[self._at :]], 0
        for piece in self._pieces:
            parts.append(piece)
            num_read += len(piece)
            if num_read >= num_characters:
                break
        else:
            self._is_whole = True
        self._window, self._at = "".join(parts), 0
        return num_read > 0

    def _fail(self, message: str, index: int) -> None:
        before = self._window[:index]
        line = self._line + before.count("\n")
        column = len(before) - before.rfind("\n") if "\n" in before else self._column + len(before) + 1
        at = f"line {line} " if line > 1 else ""
        raise DataError(f"{self._path}: not valid JSON ({message} at {at}column {column}); {_REMEDY}")


def _pieces(blocks: Iterable[bytes], path: str) -> Iterator[str]:
    """Decode the bytes in pieces of about `_PIECE_BYTES`."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    gathered: list[bytes] = []
    num_before = num_gathered = 0
    for block in blocks:
        gathered.append(block)
        num_gathered += len(block)
        if num_gathered >= _PIECE_BYTES:
            yield _decoded(decoder, b"".join(gathered), num_before, path, final=False)
            num_before, num_gathered, gathered = num_before + num_gathered, 0, []
    yield _decoded(decoder, b"".join(gathered), num_before, path, final=True)


def _decoded(decoder: Any, content: bytes, num_before: int, path: str, *, final: bool) -> str:
    try:
        text: str = decoder.decode(content, final)
    except UnicodeDecodeError as error:
        byte = num_before + error.start
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {byte}); save the file as UTF-8") from None
    return text
