"""Reads the chat messages of a row, and refuses those of which a part would be lost silently."""

from __future__ import annotations

import json
import re
from typing import Any

from rlinf_lite.data.errors import DataError

Messages = list[dict[str, str]]
"""Each with the keys ``role`` and ``content``."""

_EXAMPLE = '[{"role": "user", "content": "..."}]'
_LOOKS_LIKE_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content)['"]\s*:""")
ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles that every chat template is expected to support, or to refuse itself."""
_ROLE_OF = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "chatgpt": "assistant",
}
"""Our name of each role, by the names that other formats use."""


def messages_of(value: list[Any], where: str) -> Messages:
    """The messages of a row, each reduced to role and text.

    Other fields are dropped: tables fill them with None, which templates may mistake for a value.

    Raises:
        DataError: an element is not a message, or has content that would be lost. Names the message.
    """
    if not value:
        raise DataError(f"{where}: the prompt is an empty list of messages; remove the row or set data.prompt_key=...")
    messages = [_message(message, f"{where}: message {number}") for number, message in enumerate(value, start=1)]
    for number, message in enumerate(messages, start=1):
        is_last = number == len(messages)
        if not message["content"].strip() and (is_last or message["role"] == "user"):
            raise DataError(
                f"{where}: message {number} (role {message['role']!r}) is empty; give it content, or remove it"
            )
    return messages


def messages_in_text(text: str, where: str) -> Messages | None:
    """The messages that ``text`` holds as JSON (tables without list columns store them so); None for any other text.

    Raises:
        DataError: the text begins like a list of messages but is not one.
    """
    if not _LOOKS_LIKE_MESSAGES.match(text):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: the prompt begins like a list of messages, but is not JSON ({error}); write "
            f"{_EXAMPLE}, for example with json.dumps"
        ) from None
    return messages_of(value, where)


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise DataError(f"{where} is {_kind(message)}, not an object with role and content; write {_EXAMPLE}")
    role = message.get("role")
    if not isinstance(role, str) or not role.strip():
        named = "" if role is None else f" that is text ({role!r})"
        raise DataError(
            f"{where} has no role{named}, only {', '.join(map(str, message)) or 'nothing'}; write {_EXAMPLE}, or set "
            "data.prompt_key=..."
        )
    if (known := _ROLE_OF.get(role.strip().lower(), role)) != role:
        raise DataError(f"{where} has the role {role!r}; write {known!r}")
    if lost := [key for key in ("tool_calls", "function_call") if message.get(key)]:
        raise DataError(f"{where} has {lost[0]}, which would be lost; write the call into its content as text")
    return {"role": role, "content": _text(message.get("content"), where)}


def _text(content: Any, where: str) -> str:
    """The content of a message; parts of type text are joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"{where} has the content {_kind(content)}, not text; write text, or remove the message")
    return "".join(_part(part, where) for part in content)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind, text = (part.get("type", "text"), part.get("text")) if isinstance(part, dict) else (_kind(part), None)
    if kind != "text" or not isinstance(text, str):
        raise DataError(f"{where} has a part of its content of type {kind!r} without text; only text is read")
    return text


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
