r"""Finds answers in running text: after "the answer is", or the last expression if no answer is marked.

A text is split into runs of mathematics between words. A run is taken whole or not at all, so that ``2^{10}`` never
yields 10, nor ``(3, 4)`` a 4. Every search is one pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from rlinf_lite.rewards.plain_numbers import NUMBER

_MATH_WORDS = (
    "sqrt|pi|sin|cos|tan|cot|sec|csc|log|ln|exp|gcd|lcm|infinity|inf|mod|percent|degrees?|hundred|thousand|million|"
    "billion|trillion"
)
_SPAN = re.compile(
    r"\$\$(?P<display>[^$]+)\$\$|(?<![\\0-9])\$(?!\s)(?P<inline>(?:[^$\\\n]|\\.)+?)(?<!\s)\$(?![0-9])"
    r"|\\\((?P<round>(?:[^\\]|\\(?!\)))+)\\\)|\\\[(?P<square>(?:[^\\]|\\(?!\]))+)\\\]",
    re.DOTALL,
)
_TOKEN = re.compile(
    rf"""(?P<space>\s+)
    |(?P<number>(?=\.?[0-9]){NUMBER}(?:[eE][-+]?[0-9]+(?![\w.]))?)
    |(?P<math>\\(?:text|mathrm|mathbf|textbf|operatorname)\s*\{{[^{{}}]*\}}|\\[A-Za-z]+|\\.|(?:{_MATH_WORDS})(?![A-Za-z])
        |[-+*/^_=<>|!%(){{}}\[\]&$~'\u2212\u2013\u00d7\u00f7\u00b1\u00b7\u2044\u2215\u221a\u221b\u00b0\u221e\u2264\u2265\u2248\u03b1-\u03c9]
        |[\u00b2\u00b3\u00b9\u2070-\u209c\u00bc-\u00be\u2150-\u215e\uff01-\uff5e])
    |(?P<letter>(?<![A-Za-z])[A-Za-z](?![A-Za-z]|'[a-z]))
    |(?P<word>[^\W\d_]+(?:'[a-z]+|\^\{{?-?[0-9]+\}}?|[\u00b2\u00b3])?)
    |(?P<colon>:)|(?P<comma>[,;])|(?P<stop>.)""",
    re.VERBOSE | re.DOTALL,
)
_PLAIN_START = re.compile(rf"[\s:*]*(-?\$?(?=\.?[0-9]){NUMBER})\**\.?\**\s*(?:\n|$)")
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_POWER_STARS = re.compile(r"(?<=[\w)])\*\*(?=[\w(])")
_CHOICE = re.compile(r"(?:option|choice)?\s*(?:\(([A-J])\)|([A-J])(?![\w'^_/+*=(-])([).:])?)")
_CHOICE_WITH_OTHERS = re.compile(r"\s*(?:or|and|/|,|&)\s*\(?[A-J]\b")
_REASON = re.compile(r"(?:because|since|as|so|but|with|for|which|is|due|and|in|by|from|per|that)\b", re.IGNORECASE)
_UNIT_THEN_NUMBER = re.compile(
    rf"\s*[A-Za-z]+(?:\s+[A-Za-z]+)?(?:\s*,|\s+and|\s+plus)?\s+{NUMBER.replace('?', '', 1)}(?![0-9])"
)
_PREPOSITION = re.compile(
    r"\b(?:for|from|in|at|on|of|because|since|as|if|when|with|by|after|per|each|every|to|which|so)\b"
)
_COMMENT = re.compile(r"\s\((?=[^()]*[A-Za-z]{2}|[^()]*=)")
_LEADING_JUNK = re.compile(r"[\s:*_=]*")
_LIST_BEFORE = re.compile(r"(?:\bare|:|=)\s*$|^\s*$")
_NO_VARIABLE = re.compile(
    r"(?<=[0-9])[mgshlL](?![A-Za-z])|(?<!\S)[xX](?=\s)|\\(?:times|cdot|frac|div|text\s*\{[^{}]*\}|\$)"
)
_ONE_WORD = re.compile(r"\s*[*(]{0,3}[^\W\d_]+[*).]{0,3}\s*")
_DENIED = re.compile(r"\b(?:is not|isn't|cannot be|can't be) [^,;\n]{0,40}?(?=[,;\n]|\.\s|\.?$|\bbut\b)")
_MAX_CHARS = 4000
"""An expression further from the end of a response is not its answer."""
_TRAILING = " \t\n,;:.=<*/(["


class Run(NamedTuple):
    """A run of mathematics: its text, its place in the text around it, and whether it contains a number."""

    text: str
    start: int
    end: int
    has_number: bool


def leading_answer(text: str) -> tuple[str, bool]:
    """``(answer, is_certain)`` at the beginning of ``text``, which follows "the answer is" or ``####``.

    Expressions, numbers and choices are certain; words are not, because "the answer is correct" states no answer.
    """
    plain = _PLAIN_START.match(text)
    if plain:
        return plain[1], True
    line = _without_bold(text[_LEADING_JUNK.match(text).end() :])  # type: ignore[union-attr]
    choice = _choice(line)
    if choice:
        return choice, True
    spans = _leading_spans(line)
    if spans:
        return spans, True
    line = line.split("\n", 1)[0].strip()
    sentence = _SENTENCE_END.split(line, maxsplit=1)[0].strip(" \t*_\"'")
    first = next(_runs(line), None)
    if first is None or first.start > 0 or not first.text:
        return sentence, False
    rest = line[first.end :]
    if _UNIT_THEN_NUMBER.match(rest) and not _PREPOSITION.search(_SENTENCE_END.split(rest, maxsplit=1)[0]):
        return sentence, True
    return first.text, True


def last_expression(text: str) -> str:
    """The last run of mathematics that contains a number, or the last formula between ``$`` longer than a letter.

    If the text is a single word, that word. Empty if there is nothing of the kind.
    """
    for line in map(_without_bold, reversed(_lines(_DENIED.sub(" ", _end_of(text))))):
        found = ""
        position = 0
        for span in _SPAN.finditer(line):
            found = _last_run(line[position : span.start()]) or found
            content = _content(span)
            rest = line[span.end() : span.end() + 2]
            if re.search(r"[0-9]|\\[A-Za-z]|[A-Za-z]\W", content):
                found = content + ("%" if rest.startswith(("%", "\\%")) else "")
            position = span.end()
        found = _last_run(line[position:]) or found
        if found:
            return right_side(found)
    return text.strip(" \t\n*.()") if _ONE_WORD.fullmatch(text) else ""


def right_side(expression: str) -> str:
    """The result of a calculation or of a named value: 42 of ``40 + 2 = 42``. An equation stays whole."""
    left, equals, right = expression.rpartition("=")
    if not equals:
        return expression
    is_value = not re.search(r"[A-Za-z]", _NO_VARIABLE.sub("", left)) or re.fullmatch(
        r"\s*\\?[A-Za-z]+(?:\([a-z]\))?\s*(?:=[^A-Za-z]*)?", left
    )
    is_equation = not right.strip() or left.endswith(("<", ">", "!")) or not is_value
    return expression if is_equation else right.strip()


def _lines(text: str) -> list[str]:
    """The lines of a text; a display formula over several lines is joined into one."""
    joined = re.sub(r"(\\\[|\$\$)\s*\n\s*([^\n$]*?)\s*\n\s*(\\\]|\$\$)", r"\1\2\3", text)
    return joined.split("\n")


def _end_of(text: str) -> str:
    if len(text) <= _MAX_CHARS:
        return text
    return re.sub(r"^\S*", "", text[-_MAX_CHARS:])  # whole words


def _last_run(text: str) -> str:
    found = ""
    for run in _runs(re.sub(r"\\(?:f?boxed|framebox)\s*", "", text)):
        if run.has_number:
            found = run.text
    return found


def _leading_spans(text: str) -> str:
    """``$5$``, ``$3$ and $4$``, ``$5$%`` at the beginning of ``text``."""
    found, position = "", 0
    while True:
        span = _SPAN.match(text, position)
        if span is None:
            break
        found += _content(span)
        joint = re.compile(r"\s*(,|;|and|or|,\s*and|,\s*or)\s*(?=\$|\\\()").match(text, span.end())
        position = span.end()
        if joint is None:
            break
        found += f" {joint[1]} " if joint[1][0].isalpha() else f"{joint[1]} "
        position = joint.end()
    if found and re.match(r"\s*\\?%", text[position:]):
        found += "%"
    return found


def _content(span: re.Match[str]) -> str:
    return next(group for group in span.groups() if group is not None).strip()


def _choice(line: str) -> str:
    match = _CHOICE.match(line)
    if match is None:
        return ""
    sentence = re.split(r"\n|\.(?:\s|$)", line, maxsplit=1)[0].strip()
    rest = line[match.end() :]
    if _CHOICE_WITH_OTHERS.match(rest):
        return sentence
    letter = match[1] or match[2]
    following = re.match(r"\s*([A-Za-z]+)", rest)
    if match[1] is None and not match[3] and following and not _REASON.match(following[1]):
        return ""  # "A triangle", "C major": words
    if (match[1] or match[3] in (")", ":")) and rest.strip() and not _REASON.match(rest.strip()):
        return sentence
    return letter


def _without_bold(text: str) -> str:
    if "**" not in text:
        return text
    kept = _POWER_STARS.sub("\0", text.split("\n\n", 1)[0] if text[:1] != "\n" else text)
    return kept.replace("**", "").replace("\0", "**")


def _runs(text: str) -> Iterator[Run]:
    """Yield the maximal runs of mathematics in ``text``, without the punctuation around them."""
    start, has_number = -1, False
    comments = {match.end() - 1 for match in _COMMENT.finditer(text)}
    tokens = list(_TOKEN.finditer(text))
    for index, token in enumerate(tokens):
        kind = token.lastgroup
        if _continues(tokens, index, text, inside=start >= 0) and token.start() not in comments:
            if start < 0 and kind != "space":
                start, has_number = token.start(), False
            has_number = has_number or kind == "number"
            continue
        if start >= 0:
            yield _run(text, start, token.start(), has_number)
            start = -1
    if start >= 0:
        yield _run(text, start, len(text), has_number)


def _run(text: str, start: int, end: int, has_number: bool) -> Run:
    content = text[start:end]
    stripped = content.rstrip(_TRAILING).removesuffix("\\\\")
    # "The answer is 18!" is an exclamation, not a factorial.
    if (
        stripped.endswith("!")
        and not text[end:].lstrip().startswith(("=", "/", "*"))
        and not re.search("[a-z]!$", stripped)
    ):
        stripped = stripped.rstrip("!")
    depth = 0
    for char in stripped:  # a bracket opened before the run, or closed after a comment, is not part of it
        depth += (char in "([") - (char in ")]")
    if depth < 0 and stripped.endswith((")", "]")) and not re.search(r"[(\[].*,.*[)\]]$", stripped):
        stripped = stripped[:-1].rstrip(_TRAILING)
    if re.match(r"[-*+]\s+(?=[0-9$])", stripped) and start == 0:
        stripped = stripped if stripped[0] == "-" else stripped[1:].lstrip()
    return Run(stripped.strip(), start, start + len(content.rstrip()), has_number)


def _continues(tokens: list[re.Match[str]], index: int, text: str, inside: bool) -> bool:
    """Whether a token belongs to a run of mathematics.

    Args:
        inside: whether the token before it belongs to a run.
    """
    token = tokens[index]
    kind = token.lastgroup
    if kind in ("number", "math"):
        return True
    if kind == "space":
        return inside and "\n" not in token[0]
    following = _next(tokens, index)
    if kind == "letter":
        if token[0] not in "aAI" or text[token.end() : token.end() + 1] != " " or following is None:
            return True
        return following.lastgroup == "math" and following[0] in "=+-*/^<>"
    if kind == "colon":
        return inside and text[token.start() - 1].isdigit() and text[token.end() : token.end() + 1].isdigit()
    if kind == "comma":
        return (
            inside
            and following is not None
            and following.lastgroup in ("number", "math", "letter")
            and (_in_brackets(text, token.start()) or _is_list(tokens, index, text))
        )
    if kind == "word" and token[0] in ("and", "or"):
        around = (_next(tokens, index, -1), following)
        return inside and all(one is not None and one.lastgroup == "number" for one in around)
    return False


def _next(tokens: list[re.Match[str]], index: int, step: int = 1) -> re.Match[str] | None:
    index += step
    while 0 <= index < len(tokens) and tokens[index].lastgroup == "space":
        index += step
    return tokens[index] if 0 <= index < len(tokens) else None


def _in_brackets(text: str, position: int) -> bool:
    window = text[max(0, position - 200) : position]
    return sum(map(window.count, "([{")) > sum(map(window.count, ")]}"))


def _is_list(tokens: list[re.Match[str]], index: int, text: str) -> bool:
    """Whether a comma separates list items, as in ``the roots are 3, 4``, but not in ``in step 3, 4 eggs``.

    The text before the first item decides.
    """
    first = index
    while (
        first > 0
        and tokens[first - 1].lastgroup in ("number", "math", "letter", "space", "comma")
        and index - first < 80
    ):
        first -= 1
    return bool(_LIST_BEFORE.search(text[max(0, tokens[first].start() - 20) : tokens[first].start()]))
