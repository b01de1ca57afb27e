"""Prompt texts to token ids, in batches, optionally on threads. The order of the texts is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenIds = tuple[int, ...]

_TEXTS_A_BATCH = 512


def tokenize(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool, num_threads: int
) -> list[TokenIds]:
    """Token ids of each text; ``num_threads`` 0 or less uses none besides the caller's. The ids do not depend on it."""

    def encode(batch: Sequence[str]) -> list[TokenIds]:
        encoded = tokenizer(list(batch), add_special_tokens=add_special_tokens)["input_ids"]
        return [tuple(ids) for ids in encoded]

    batches = list(_batches(texts))
    # The first call may reset padding and truncation in the shared Rust object, which fails while a thread uses it.
    first = [encode(batch) for batch in batches[:1]]
    if num_threads > 0:
        with ThreadPoolExecutor(num_threads) as pool:
            rest = list(pool.map(encode, batches[1:]))
    else:
        rest = [encode(batch) for batch in batches[1:]]
    return list(chain.from_iterable(first + rest))


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), _TEXTS_A_BATCH):
        yield texts[start : start + _TEXTS_A_BATCH]
