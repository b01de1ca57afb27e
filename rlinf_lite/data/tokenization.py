"""Prompt texts to token ids, in batches, beside the reading of the next ones. The order of the texts is kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenIds = list[int]
Encode = Callable[[Sequence[str]], list[TokenIds]]
T = TypeVar("T")


def encoder(tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool) -> Encode:
    """The function from texts to the token ids that ``tokenizer(texts)`` gives, without what else that computes.

    May be called from several threads at once.
    """
    from transformers import TokenizersBackend

    # The first call may reset padding and truncation in the shared Rust object, which fails while a thread uses it.
    tokenizer(["a"], add_special_tokens=add_special_tokens)
    if isinstance(tokenizer, TokenizersBackend) and type(tokenizer)._encode_plus is TokenizersBackend._encode_plus:
        core = tokenizer.backend_tokenizer

        def encode(texts: Sequence[str]) -> list[TokenIds]:
            found = core.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
            return [encoding.ids for encoding in found]

        return encode

    def call(texts: Sequence[str]) -> list[TokenIds]:
        found = tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
        return [list(ids) for ids in found]

    return call


def in_background(
    batches: Iterable[tuple[T, Sequence[str]]], encode: Encode, *, num_threads: int
) -> Iterator[tuple[T, Sequence[str], list[TokenIds]]]:
    """Each batch with the token ids of its texts, in order.

    Args:
        num_threads: batches encoded at the same time; the tokenizer may use threads of its own for each.
    """
    running: deque[tuple[T, Sequence[str], Future[list[TokenIds]]]] = deque()
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
