r"""Extracts the final answer of a text: boxes, ``<answer>``, ``####``, "the answer is", or the last expression.

Their precedence is described in ``docs/data-and-rewards.md``. Every search is one pass over the text, because responses
are long and a model may write anything.
"""

from __future__ import annotations

import re
from collections import deque

from rlinf_lite.rewards.plain_numbers import MAX_CHARS, NUMBER
from rlinf_lite.rewards.running_text import last_expression, leading_answer, right_side

_BOX_OR_BRACE = re.compile(
    r"\\(?:f?boxed|fbox|framebox)\s*(?P<open>\{)|\\(?:boxed|fbox)[ \t]+(?P<bare>[^\s{}$\\]+)|\\.|[{}]", re.DOTALL
)
_BETWEEN_BOXES = re.compile(r"[\s$]*(?:,|;|,?\s*(?:and|or)\b)?[\s$]*")
_PLACEHOLDER = re.compile(
    r"(?:\\text\w*\{)?\s*(?:|\.{2,}|\\[lc]?dots|…|_+|\?|<[^<>]*>|\[[^\[\]]*[a-z]{3}[^\[\]]*\]|"
    r"(?:the |your |final |numerical |numeric |correct )*(?:answer|result|value|solution|number)(?: here)?)\s*\}?",
    re.IGNORECASE,
)
_HASHES = re.compile(r"####[ \t]*([^\n#][^\n]*)")
_HEADING = re.compile(r"(?:[0-9]+|[A-Z]|[ivxIVX]+)[.):][ \t]+\**[A-Za-z]")
_PLAIN_LINE = re.compile(rf"-?\$?(?=\.?[0-9]){NUMBER}")
_BARE_WORD = re.compile(r"[\s*]*(?:yes|no|true|false|none|\(?[A-J]\)?)[\s*.]*", re.IGNORECASE)
_ANSWER_IS = re.compile(
    r"\b(?:answers?|(?:correct|right)\s(?:option|choice))\b\*{0,2}(?:(?:\s(?:to|for|of|in)\b[^.:\n]{0,80}?)?"
    r"\s{1,4}(?:is|are|was|equals|would be|should be|must be|will be|comes to)\b"
    r"(?:,?\s(?:therefore|thus|hence|then|simply)\b,?)?\s?:?"
    r"|\s{0,4}\*{0,2}\s?[:=]"
    r"|[ \t]{0,4}\*{0,2}[ \t]{0,4}\n{1,4}(?=\s?[^\sA-Za-z]))",
    re.IGNORECASE,
)
_MAX_STATEMENTS = 50
"""How many of the last statements of one kind are examined, and how many boxes can form one list."""
_MAX_STATEMENT_CHARS = MAX_CHARS + 500
_TAG = re.compile(r"<answer>|</answer>", re.IGNORECASE)
_THINK = re.compile(r"<think>|</think>", re.IGNORECASE)
_CALCULATION = re.compile(r"<<[^<>\n]*>>")
_NEGATION = re.compile(r"[\s:*]*(?:not|n't|neither|unknown|unclear)\b", re.IGNORECASE)
_MATH_SPAN = re.compile(r"\$\$(.+?)\$\$|\$(?!\s)([^$]+)(?<!\s)\$(?![0-9])|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)

ANSWER_FORMATS = ("auto", "boxed", "hashes", "last_number")


def final_answer(response: str, answer_format: str = "auto") -> str:
    r"""The final answer of a response; empty if it states none.

    Args:
        answer_format: ``auto``: the last of all closed boxes, ``<answer>...</answer>``, ``#### x`` and "the answer is
            x", or else the last expression with a number. ``boxed``, ``hashes``, ``last_number``: only that kind.
    """
    text = _CALCULATION.sub("", _without_thinking(response))
    if answer_format == "boxed":
        return _last_box(text)[0]
    if answer_format == "hashes":
        return _after_hashes(text)[0]
    if answer_format == "last_number":
        return last_expression(text)
    return _auto(text)


def reference_answer(answer: str) -> str:
    r"""The answer that a data set states: after ``####``, in ``\boxed{}``, between ``$``, or after "the answer is".

    Otherwise the text itself.
    """
    hashes = _last(_HASHES, answer)
    if hashes:
        return hashes[1].strip()
    box, was_opened, _ = _last_box(answer)
    if was_opened:
        return box
    math = _MATH_SPAN.fullmatch(answer.strip())
    if math:
        return next(group for group in math.groups() if group is not None).strip()
    return _after_answer_is(answer)[0] or answer.strip()


def _auto(text: str) -> str:
    box, box_was_opened, box_end = _last_box(text)
    tag, tag_end = _last_tag(text)
    hashes, hashes_start = _after_hashes(text)
    phrase, phrase_start, is_certain = _after_answer_is(text)
    stated = [(box_end, box), (tag_end, tag), (hashes_start, hashes)]
    if is_certain or not (box or tag or hashes):
        stated.append((phrase_start, phrase))
    _, answer = max(stated)
    if answer:
        return answer
    # A response whose only box was truncated states no answer.
    return "" if box_was_opened and not box else last_expression(text)


def _without_thinking(text: str) -> str:
    """The text after the last ``</think>``, up to a ``<think>`` that is never closed."""
    if "think>" not in text and "THINK>" not in text:
        return text
    start, end, opened = 0, len(text), None
    for match in _THINK.finditer(text):
        if match[0][1] == "/":
            start, opened = match.end(), None
        elif opened is None:
            opened = match.start()
    if opened is not None:
        end = opened
    return text[start:end]


def _last_box(text: str) -> tuple[str, bool, int]:
    """``(content, was_opened, end)`` of the last closed box that is not a placeholder.

    ``was_opened`` is also true if a box was truncated. Boxes that follow each other (``\\boxed{1}`` and ``\\boxed{2}``)
    form one list.
    """
    if "box" not in text:
        return "", False, -1
    boxes: list[tuple[int, int, int, int]] = []  # begins, content begins, content ends, ends
    open_braces: list[tuple[int, int]] = []
    for match in _BOX_OR_BRACE.finditer(text):
        if match["bare"]:
            boxes.append((match.start(), match.start("bare"), match.end("bare"), match.end()))
        elif match[0].endswith("{") and (match["open"] or match[0] == "{"):
            open_braces.append((match.start() if match["open"] else -1, match.end()))
        elif match[0] == "}" and open_braces:
            start, content_start = open_braces.pop()
            if start >= 0 and not _is_placeholder(text, content_start, match.start()):
                boxes.append((start, content_start, match.start(), match.end()))
    if not boxes:
        return "", any(start >= 0 for start, _ in open_braces), -1
    boxes.sort()  # the innermost box of nested ones begins last
    end = boxes[-1][3]
    last = [boxes.pop()]
    while boxes and boxes[-1][3] <= last[-1][0] and len(last) < _MAX_STATEMENTS:
        if not _BETWEEN_BOXES.fullmatch(text[boxes[-1][3] : min(last[-1][0], boxes[-1][3] + 40)]):
            break
        last.append(boxes.pop())
    contents = [text[box[1] : box[2]].strip() for box in reversed(last)]
    return ", ".join(dict.fromkeys(contents)), True, end


def _is_placeholder(text: str, start: int, end: int) -> bool:
    """Whether the content of a box states nothing: ``\\boxed{}``, ``\\boxed{...}``, ``\\boxed{answer}``."""
    return end - start <= 100 and bool(_PLACEHOLDER.fullmatch(text[start:end]))


def _last_tag(text: str) -> tuple[str, int]:
    if "nswer>" not in text and "NSWER>" not in text:
        return "", -1
    start, content, end = -1, "", -1
    for match in _TAG.finditer(text):
        if match[0][1] != "/":
            start = match.end()
        elif start >= 0:
            content, end, start = text[start : match.start()].strip(), match.end(), -1
    if _is_placeholder(content, 0, len(content)):
        return "", -1
    box, was_opened, _ = _last_box(content)
    phrase, _, is_certain = _after_answer_is(content)
    return (box if was_opened else phrase if is_certain else right_side(content)), end


def _after_hashes(text: str) -> tuple[str, int]:
    """``(answer, start)`` of the last ``####`` line that states an answer and is not a heading."""
    for match in reversed(deque(_HASHES.finditer(text), maxlen=_MAX_STATEMENTS)):
        answer = _hash_answer(match[1][:_MAX_STATEMENT_CHARS].strip())
        if answer:
            return answer, match.start()
    return "", -1


def _hash_answer(line: str) -> str:
    if _PLAIN_LINE.fullmatch(line):
        return line
    if _HEADING.match(line):
        return ""
    if _BARE_WORD.fullmatch(line):
        return line.strip(" *.")
    phrase = _ANSWER_IS.match(line)
    answer, is_certain = leading_answer(line[phrase.end() :] if phrase else line)
    return right_side(answer) if is_certain else ""


def _after_answer_is(text: str) -> tuple[str, int, bool]:
    """``(answer, start, is_certain)`` of the last "the answer is" that is followed by an answer."""
    words = ("", -1, False)
    if not any(word in text for word in ("nswer", "NSWER", "option", "choice")):
        return words
    for match in reversed(deque(_ANSWER_IS.finditer(text), maxlen=_MAX_STATEMENTS)):
        following = text[match.end() : match.end() + _MAX_STATEMENT_CHARS]
        if _NEGATION.match(following):
            continue
        answer, is_certain = leading_answer(following)
        if is_certain and answer:
            return right_side(answer), match.start(), True
        if answer and not words[0]:
            is_short_line = match[0].rstrip("* \t").endswith(":") and len(answer.split()) <= 3
            words = answer, match.start(), is_short_line
            if is_short_line:
                return words
    return words


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    matches = deque(pattern.finditer(text), maxlen=1)
    return matches[0] if matches else None
