"""Finds texts that have more tokens than a limit by tokenizing only their beginning.

A tokenizer that splits text into words by a known pattern tokenizes each word on its own. These patterns always end a
word between a letter and a space that is followed by a letter, whatever surrounds them. At such an ``end``,
``tokens(text) == tokens(text[:end]) + tokens(text[end:])``, so it is enough that the beginning exceeds the limit.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {_WORDS + r"\p{N}" + _REST, _WORDS + r"\p{N}{1,3}" + _REST}
"""The patterns of Qwen 2, 2.5 and 3, and of Llama 3; that of GPT-2 and SmolLM2 is built into ``ByteLevel``."""
_WORD_END = re.compile(r"[A-Za-z](?= [A-Za-z])")
_CHARACTERS_PER_TOKEN = 6
"""More than the 4 to 5 of English, so that the beginning is usually long enough."""
_MAX_WORD = 4096


def beginning(text: str, limit: int) -> str | None:
    """The beginning of ``text``, up to the end of a word, that probably has more than ``limit`` tokens.

    None if ``text`` is not much longer than that, or has no word end there.
    """
    start = _CHARACTERS_PER_TOKEN * (limit + 1)
    if len(text) < 2 * start:
        return None
    found = _WORD_END.search(text, start, start + _MAX_WORD)
    return text[: found.end()] if found else None


def splits_into_words(tokenizer: Tokenizer) -> bool:
    """Whether this tokenizer is known to tokenize each word on its own, as the module's docstring requires."""
    from tokenizers import normalizers

    if tokenizer.normalizer is not None and not isinstance(tokenizer.normalizer, normalizers.NFC):
        return False
    for token in tokenizer.get_added_tokens_decoder().values():
        if token.lstrip or token.rstrip or token.single_word or re.search(r"\s", token.content):
            return False
    return tokenizer.pre_tokenizer is not None and _is_known(json.loads(tokenizer.pre_tokenizer.__getstate__()))


def _is_known(state: dict[str, Any]) -> bool:
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    *before, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return False
    by_pattern = [step for step in before if step["type"] == "Split"]
    for step in by_pattern:
        if step["pattern"].get("Regex") not in _PATTERNS or step["behavior"] != "Isolated" or step["invert"]:
            return False
    others = [step for step in before if step["type"] not in ("Split", "Digits")]
    return not others and len(by_pattern) + last["use_regex"] == 1
