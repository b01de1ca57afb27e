"""Tokenizes prompts in batches, in background threads, while the next rows are read. Keeps their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from rlinf_lite.data.long_texts import beginning, splits_into_words

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

TokenIds = list[int]
Encode = Callable[[Sequence[str]], list[TokenIds | None]]
"""Token ids of each text; None for a text that has more tokens than the limit."""
T = TypeVar("T")


def encoder(tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool, limit: int | None) -> Encode:
    """Make the function that turns texts into token ids: those of ``tokenizer(texts)``, without its other outputs.

    The function may be called from several threads at once.

    Args:
        limit: may return None for texts with more tokens than this. None: no limit.
    """
    from transformers import TokenizersBackend

    # The first call may reset padding and truncation in the shared Rust object, which fails while a thread uses it.
    tokenizer(["a"], add_special_tokens=add_special_tokens)
    if isinstance(tokenizer, TokenizersBackend) and type(tokenizer)._encode_plus is TokenizersBackend._encode_plus:
        return _fast_encoder(tokenizer.backend_tokenizer, add_special_tokens=add_special_tokens, limit=limit)

    def call(texts: Sequence[str]) -> list[TokenIds | None]:
        found = tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
        return [list(ids) for ids in found]

    return call


def _fast_encoder(core: Tokenizer, *, add_special_tokens: bool, limit: int | None) -> Encode:
    may_stop_early = limit is not None and splits_into_words(core)

    def is_longer(text: str) -> bool:
        assert limit is not None
        part = beginning(text, limit)
        return part is not None and len(core.encode_batch_fast([part], add_special_tokens=False)[0]) > limit

    def encode(texts: Sequence[str]) -> list[TokenIds | None]:
        longer = {row for row, text in enumerate(texts) if is_longer(text)} if may_stop_early else set()
        wanted = [text for row, text in enumerate(texts) if row not in longer]
        found = iter(core.encode_batch_fast(wanted, add_special_tokens=add_special_tokens))
        return [None if row in longer else next(found).ids for row in range(len(texts))]

    return encode


def in_background(
    batches: Iterable[tuple[T, Sequence[str]]], encode: Encode, *, num_threads: int
) -> Iterator[tuple[T, Sequence[str], list[TokenIds | None]]]:
    """Yield each batch with the token ids of its texts, in order.

    Args:
        num_threads: batches encoded at the same time; the tokenizer may use more threads for each.
    """
    running: deque[tuple[T, Sequence[str], Future[list[TokenIds | None]]]] = deque()
    pool = ThreadPoolExecutor(num_threads)
    try:
        for item, texts in batches:
            running.append((item, texts, pool.submit(encode, texts)))
            if len(running) > num_threads:
                item, texts, encoding = running.popleft()
                yield item, texts, encoding.result()
        while running:
            item, texts, encoding = running.popleft()
            yield item, texts, encoding.result()
    finally:
        pool.shutdown(cancel_futures=True)
