"""Extracts question, answer and metadata from a row, by the keys that the config names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from rlinf_lite.config import DataConfig
from rlinf_lite.data.errors import DataError
from rlinf_lite.data.messages import Messages, messages_in_text, messages_of
from rlinf_lite.data.numbers import number_text
from rlinf_lite.data.rows import Row

_ABSENT = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A problem before its prompt is rendered."""

    path: str
    """The path as configured, or the name of the generator."""
    line: int
    """1-based line of the file, or number of the generated problem."""
    content: str | Messages
    """The question: a text, or chat messages."""
    answer: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """For `Problem.metadata`."""

    @property
    def where(self) -> str:
        """For error messages: ``"data/train.jsonl:17"``."""
        return f"{self.path}:{self.line}"


def question_reader(config: DataConfig) -> Callable[[Row], Question]:
    """Make the function that turns a row into a `Question`.

    The function raises `DataError` if the row lacks a key, or if a value cannot be a question or an answer.
    """

    def read(row: Row) -> Question:
        return Question(
            path=row.path,
            line=row.line,
            content=_content(_value(row, config.prompt_key, "prompt_key"), row),
            answer="" if config.answer_key is None else _answer(row, config.answer_key),
            metadata={key: _value(row, key, "metadata_keys") for key in config.metadata_keys},
        )

    return read


def _value(row: Row, key: str, config_key: str) -> Any:
    """The field with this name, or at this path in nested objects: ``extra_info.answer``."""
    if key in row.fields:
        return row.fields[key]
    found: Any = row.fields
    for name in key.split("."):
        found = found.get(name, _ABSENT) if isinstance(found, dict) else _ABSENT
    if found is _ABSENT:
        names = ", ".join(_names(row.fields))
        raise DataError(f"{row.where}: no key {key!r}; the row has {names}; set data.{config_key}=...")
    return found


def _names(fields: Mapping[str, Any], prefix: str = "") -> list[str]:
    names = []
    for key, value in fields.items():
        names += _names(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"]
    return names


def _content(value: Any, row: Row) -> str | Messages:
    if isinstance(value, list):
        return messages_of(value, row.where)
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise DataError(f"{row.where}: the prompt is {kind}, not text; set data.prompt_key=...")
    if not value.strip():
        raise DataError(f"{row.where}: the prompt is empty; remove the row or set data.prompt_key=...")
    return messages_in_text(value, row.where) or value


def _answer(row: Row, key: str) -> str:
    value = _alone(_value(row, key, "answer_key"))
    if isinstance(value, str) and value.strip():
        return value
    exact = None
    if isinstance(value, float) and row.exact is not None:
        exact = _alone(_value(replace(row, fields=row.exact()), key, "answer_key"))
    try:
        text = number_text(value, exact)
    except OverflowError as error:
        raise DataError(f"{row.where}: the answer {key!r} is {error}; write it as text") from None
    if text is None:
        raise DataError(
            f"{row.where}: the answer {key!r} is {_kind(value)}, not text or a number; write it as text, or set "
            "data.answer_key=..."
        )
    return text


def _alone(value: Any) -> Any:
    """``["72"]`` -> ``"72"``: several public math data sets store a single answer as a list."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "empty"
    if isinstance(value, float | Decimal):
        return str(value)
    return "null" if value is None else type(value).__name__


def encode_text(text: str, where: str) -> bytes:
    """``text`` in UTF-8.

    Raises:
        DataError: ``text`` holds half a surrogate pair, which no tokenizer reads.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise DataError(f"{where}: half a surrogate pair ({code}) in the text; repair that character") from None
