"""What a decoder returns: a batch's sampled tokens, and the records made of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlinf_lite.columns import objects_of
from rlinf_lite.rollout.batches import grouped
from rlinf_lite.types import GenerationBatch, Group, Response


@dataclass(slots=True)
class Sampled:
    """The tokens of a batch's N rows, each padded to T."""

    tokens_NT: np.ndarray
    """int64."""
    logprobs_NT: np.ndarray
    """float32."""
    length_N: np.ndarray
    """int64: tokens of each response."""
    finished_N: np.ndarray
    """bool: the last token ends the response."""

    @classmethod
    def empty(cls, num_rows: int, max_tokens: int) -> Sampled:
        """Nothing sampled yet."""
        shape = num_rows, max_tokens
        return cls(
            np.zeros(shape, dtype=np.int64),
            np.zeros(shape, dtype=np.float32),
            np.zeros(num_rows, dtype=np.int64),
            np.zeros(num_rows, dtype=np.bool_),
        )

    def groups(self, batch: GenerationBatch, tokenizer: PreTrainedTokenizerBase, *, with_logprobs: bool) -> list[Group]:
        """As `RolloutEngine.generate` returns them."""
        num, max_tokens = self.tokens_NT.shape
        sampled_NT = np.arange(max_tokens) < self.length_N[:, None]
        stops = self.length_N.cumsum().tolist()

        def split(values: np.ndarray) -> list[np.ndarray]:
            return [values[stop - size : stop] for stop, size in zip(stops, self.length_N.tolist(), strict=True)]

        ids = self.tokens_NT[sampled_NT]
        all_ids = ids.tolist()
        tokens = [tuple(all_ids[stop - size : stop]) for stop, size in zip(stops, self.length_N.tolist(), strict=True)]
        distinct = list(dict.fromkeys(tokens))
        decoded = tokenizer.batch_decode([*map(list, distinct)], skip_special_tokens=True)
        text_of = dict(zip(distinct, decoded, strict=True))
        columns = {
            "sample_index": [row % batch.group_size for row in range(num)],
            "token_ids": split(ids),
            "loss_mask": split(np.ones(len(ids), dtype=np.bool_)),
            "logprobs": split(self.logprobs_NT[sampled_NT]) if with_logprobs else repeat(None),
            "finished": self.finished_N.tolist(),
            "text": [text_of[each] for each in tokens],
            "weights_step": repeat(batch.weights_step),
            "error": repeat(None),
            "score": repeat(None),
        }
        return grouped(batch, objects_of(Response, columns, num))
