"""From a row to a question: the values behind the configured keys, whatever shape they have."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from rlinf_lite.config import DataConfig
from rlinf_lite.data.errors import DataError
from rlinf_lite.data.rows import Row

Messages = list[dict[str, str]]

_ABSENT = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A problem before it is put into words for the model."""

    where: str
    """For error messages: ``"data/train.jsonl:17"``."""
    source: str
    """For `Problem.source`: ``"train.jsonl:17"``."""
    content: str | Messages
    """What is asked: a text, or chat messages."""
    answer: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """For `Problem.metadata`."""


def question_reader(config: DataConfig) -> Callable[[Row], Question]:
    """The function from row to `Question`; it raises `DataError` for a row without the keys, or with values that are no
    question or no answer.
    """

    def read(row: Row) -> Question:
        return Question(
            where=row.where,
            source=row.source,
            content=_content(_value(row, config.prompt_key, "prompt_key"), row),
            answer="" if config.answer_key is None else _answer(row, config.answer_key),
            metadata={key: _value(row, key, "metadata_keys") for key in config.metadata_keys},
        )

    return read


def canonical(metadata: Mapping[str, Any]) -> str:
    """One text for equal values, for fingerprints; what JSON has no word for counts as its text."""
    return json.dumps(metadata, sort_keys=True, default=str)


def _value(row: Row, key: str, config_key: str) -> Any:
    """The field of this name, or of this path through nested objects: ``extra_info.answer``."""
    if key in row.fields:
        return row.fields[key]
    found: Any = row.fields
    for step in key.split("."):
        found = found.get(step, _ABSENT) if isinstance(found, dict) else _ABSENT
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
        return _messages(value, row)
    if not isinstance(value, str):
        raise DataError(f"{row.where}: the prompt is {type(value).__name__}, not text; set data.prompt_key=...")
    if not value.strip():
        raise DataError(f"{row.where}: the prompt is empty; remove the row or set data.prompt_key=...")
    return value


def _messages(value: list[Any], row: Row) -> Messages:
    if not value or not all(_is_message(message) for message in value):
        raise DataError(
            f"{row.where}: the prompt is neither text nor a list of messages with the text fields 'role' and "
            "'content'; correct the row or set data.prompt_key=..."
        )
    # Other fields are left out: tables fill them with None, which templates may take for present.
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _answer(row: Row, key: str) -> str:
    value = _value(row, key, "answer_key")
    if isinstance(value, list) and len(value) == 1:  # how several public math sets store their one solution
        value = value[0]
    if _is_number(value):
        return str(value)
    if isinstance(value, str) and value.strip():
        return encodable(value, row.where)
    kind = "empty" if isinstance(value, str) else value if isinstance(value, (float, Decimal)) else type(value).__name__
    raise DataError(f"{row.where}: the answer {key!r} is {kind}, not text or a number; set data.answer_key=...")


def _is_number(value: Any) -> bool:
    if isinstance(value, (float, Decimal)):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def encodable(text: str, where: str) -> str:
    """``text``.

    Raises:
        DataError: it holds half a surrogate pair, which no tokenizer reads.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise DataError(f"{where}: half a surrogate pair ({code}) in the text; repair that character") from None
    return text
