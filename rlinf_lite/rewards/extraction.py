r"""Where in a text the final answer stands: ``\boxed{}``, GSM8K's ``####``, "the answer is", the last number.

Every search is one pass over the text: responses are long, and a model may write anything.
"""

from __future__ import annotations

import re
from collections import deque

from rlinf_lite.rewards.plain_numbers import NUMBER

_BOX_OR_BRACE = re.compile(r"\\boxed\s*(?P<open>\{)|\\boxed[ \t]+(?P<bare>[^\s{}$\\]+)|\\.|[{}]", re.DOTALL)
# A heading ("#### Step 2") is not an answer: no letter may follow.
_HASHES = re.compile(r"####[ \t]*([^\sA-Za-z#][^\n]*)")
_ANSWER_IS = re.compile(r"\banswer(?:\s+is\b|\s*:)[ \t]*:?[ \t]*\**[ \t]*", re.IGNORECASE)
_AMOUNT = rf"\\?\$?(?=\.?[0-9]){NUMBER}(?:/[0-9]+)?\\?%?"
_LAST_NUMBER = re.compile(rf"(?:(?<![\w)\]}}])[-\u2212])?{_AMOUNT}")
_LEADING_NUMBER = re.compile(rf"([-+\u2212]?{_AMOUNT})(?=\s*\**\s*$|[.,;:!?)*]+(?:\s|$)|\s+(?!(?:or|and)\b)[A-Za-z])")
_LEADING_MATH = re.compile(r"\$\$(.+?)\$\$|\$(?!\s)([^$]+)(?<!\s)\$(?![0-9])|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_SENTENCE_END = re.compile(r"\.(?:\s|$)")


def final_answer(response: str) -> str:
    r"""The answer that a response settles on, or ``""`` when it states none.

    In this order: the last closed ``\boxed{...}`` (innermost when nested); the last ``#### x``; what follows the last
    "answer is"; the last number. A response whose only box was cut off states none.
    """
    box, was_opened = _last_box(response)
    if was_opened:
        return box
    return _after_hashes(response) or _after_answer_is(response) or _last_number(response)


def reference_answer(answer: str) -> str:
    r"""The answer that a data set states: after ``####``, in ``\boxed{}``, between ``$``, or the text itself."""
    hashes = _after_hashes(answer)
    if hashes:
        return hashes
    box, was_opened = _last_box(answer)
    if was_opened:
        return box
    math = _LEADING_MATH.fullmatch(answer.strip())
    return _first_group(math) if math else answer.strip()


def _last_box(text: str) -> tuple[str, bool]:
    """Content of the closed box that begins last, and whether any box was opened at all."""
    content, content_start, was_opened = "", -1, False
    open_braces: list[tuple[bool, int]] = []
    for match in _BOX_OR_BRACE.finditer(text):
        if match["bare"]:
            content, content_start, was_opened = match["bare"].rstrip(".,;"), match.start(), True
        elif match[0].endswith("{") and (match["open"] or match[0] == "{"):
            open_braces.append((bool(match["open"]), match.end()))
            was_opened = was_opened or bool(match["open"])
        elif match[0] == "}" and open_braces:
            is_box, start = open_braces.pop()
            if is_box and start > content_start:
                content, content_start = text[start : match.start()].strip(), start
    return content, was_opened


def _after_hashes(text: str) -> str:
    match = _last(_HASHES, text)
    return match[1].strip() if match else ""


def _after_answer_is(text: str) -> str:
    match = _last(_ANSWER_IS, text)
    if match is None:
        return ""
    rest = text[match.end() :].lstrip()
    math = _LEADING_MATH.match(rest)
    if math:
        return _first_group(math)
    line = rest.split("\n", 1)[0]
    number = _LEADING_NUMBER.match(line)
    return number[1] if number else _SENTENCE_END.split(line, maxsplit=1)[0].strip(" \t*")


def _last_number(text: str) -> str:
    match = _last(_LAST_NUMBER, text)
    return match[0] if match else ""


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    matches = deque(pattern.finditer(text), maxlen=1)
    return matches[0] if matches else None


def _first_group(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None).strip()
