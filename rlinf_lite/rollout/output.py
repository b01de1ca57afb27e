"""What a decoder returns: a batch's sampled tokens, and the records made of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

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
        ids = [self.tokens_NT[row, :length].copy() for row, length in enumerate(self.length_N.tolist())]
        tokens = [tuple(of_row.tolist()) for of_row in ids]
        distinct = list(dict.fromkeys(tokens))
        decoded = tokenizer.batch_decode([*map(list, distinct)], skip_special_tokens=True)
        text_of = dict(zip(distinct, decoded, strict=True))
        all_true = np.ones(self.tokens_NT.shape[1], dtype=np.bool_)
        responses = [
            Response(
                sample_index=row % batch.group_size,
                token_ids=of_row,
                loss_mask=all_true[: len(of_row)].copy(),
                logprobs=self.logprobs_NT[row, : len(of_row)].copy() if with_logprobs else None,
                finished=bool(self.finished_N[row]),
                text=text_of[tokens[row]],
                weights_step=batch.weights_step,
            )
            for row, of_row in enumerate(ids)
        ]
        return grouped(batch, responses)
