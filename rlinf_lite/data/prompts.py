"""From a row to the text that the model sees and the answer that a reward compares with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlinf_lite.config import DataConfig
from rlinf_lite.data.errors import DataError
from rlinf_lite.data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A problem before its prompt is tokenized."""

    where: str
    """For error messages: ``"data/train.jsonl:17"``."""
    source: str
    """For `Problem.source`: ``"train.jsonl:17"``."""
    prompt: str
    answer: str


def question_reader(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Callable[[Row], Question]:
    """The function from row to `Question` that ``config`` asks for.

    Raises:
        DataError: a chat template is asked for and the tokenizer has none. The function itself raises it for a row
            without the keys, or with values that are no prompt or no answer.
    """
    if config.apply_chat_template and tokenizer.chat_template is None:
        name = tokenizer.name_or_path
        raise DataError(
            f"data.apply_chat_template=true: the tokenizer {name!r} has no chat template; set it to false, or set "
            "actor.tokenizer.tokenizer_model to a chat model's tokenizer"
        )

    def read(row: Row) -> Question:
        content = _value(row, config.prompt_key, "data.prompt_key")
        prompt = _templated(content, row, tokenizer) if config.apply_chat_template else _plain(content, row)
        answer = _answer(_value(row, config.answer_key, "data.answer_key"), row, config.answer_key)
        return Question(where=row.where, source=row.source, prompt=_encodable(prompt, row), answer=answer)

    return read


def _value(row: Row, key: str, config_key: str) -> Any:
    if key not in row.fields:
        raise DataError(f"{row.where}: no key {key!r}; the row has {', '.join(row.fields)}; set {config_key}=...")
    return row.fields[key]


def _plain(content: Any, row: Row) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        raise DataError(f"{row.where}: the prompt is a list of chat messages; set data.apply_chat_template=true")
    raise DataError(f"{row.where}: the prompt is {type(content).__name__}, not text; set data.prompt_key=...")


def _templated(content: Any, row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    from jinja2 import TemplateError

    messages = _messages(content, row)
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise DataError(f"{row.where}: the tokenizer's chat template refuses this prompt ({error})") from None
    assert isinstance(text, str)
    return text


def _messages(content: Any, row: Row) -> Messages:
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    if not isinstance(content, list) or not content or not all(_is_message(message) for message in content):
        raise DataError(
            f"{row.where}: the prompt is neither text nor a list of messages with the text fields 'role' and "
            "'content'; correct the row or set data.prompt_key=..."
        )
    # Other fields are left out: tables fill them with None, which templates may take for present.
    return [{"role": message["role"], "content": message["content"]} for message in content]


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _answer(content: Any, row: Row, key: str) -> str:
    if isinstance(content, list) and len(content) == 1:  # how several public math sets store their one solution
        content = content[0]
    if isinstance(content, (int, float)) and not isinstance(content, bool):
        return str(content)
    if isinstance(content, str):
        return _encodable(content, row)
    kind = type(content).__name__
    raise DataError(f"{row.where}: the answer {key!r} is {kind}, not text or a number; set data.answer_key=...")


def _encodable(text: str, row: Row) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise DataError(f"{row.where}: half a surrogate pair ({code}) in the text; repair that character") from None
    return text
