"""What limits micro-batches where the config does not say it: tokens, unless it gives a number of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_BY_TOKENS, _MAX_TOKENS = "runner.enable_dynamic_batch_size", "runner.max_tokens_per_mbs"
_ROWS = ("algorithm.training_batch_size_per_gpu", "algorithm.logprob_forward_micro_batch_size")
_TOKENS = 2048


def complete(values: dict[str, Any], is_given: Callable[[str], bool]) -> None:
    """Give the keys that are null their values, in place.

    Args:
        values: by dotted key; those that have a problem are absent.
        is_given: whether YAML or overrides have set a key.
    """
    if values.get(_BY_TOKENS, True) is None:
        values[_BY_TOKENS] = not any(map(is_given, _ROWS))
    if values.get(_MAX_TOKENS, True) is None:
        # Without effect if rows are counted. Then it is the value that checkpoints have from when it was the default.
        values[_MAX_TOKENS] = max(_TOKENS, values.get("runner.seq_length", 0) if values.get(_BY_TOKENS) else 0)
