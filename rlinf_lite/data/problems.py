"""Loads the problems of a split: reads or generates questions, renders, tokenizes, checks and fingerprints them."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rlinf_lite.config import ConfigError, DataConfig
from rlinf_lite.data.arithmetic import generate_sums
from rlinf_lite.data.errors import DataError
from rlinf_lite.data.files import Meter
from rlinf_lite.data.identity import Fingerprint
from rlinf_lite.data.progress import Progress
from rlinf_lite.data.prompts import Renderer, prompt_renderer
from rlinf_lite.data.questions import Question, encode_text, question_reader
from rlinf_lite.data.reasoning_gym import generate_questions
from rlinf_lite.data.rows import display_name
from rlinf_lite.data.sources import num_bytes, read_rows
from rlinf_lite.data.store import ProblemStore
from rlinf_lite.data.tokenization import TokenIds, encoder, in_background
from rlinf_lite.types import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "val"]

_BATCH_ROWS = 1024
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ProblemSet:
    """The problems of a split."""

    problems: Sequence[Problem]
    """``problems[i].problem_id == i``."""
    fingerprint: str
    """sha256 (hex) over prompts, their token ids, answers and ``data.metadata_keys``, in order; paths do not count."""
    num_filtered: int
    """Rows left out because their prompt is longer than ``data.max_prompt_length``."""
    source: str
    """For messages: ``"train.jsonl, more.parquet"``."""
    max_token_id: int
    """The largest token id in any prompt."""


def load_problems(
    config: DataConfig, split: Split, tokenizer: PreTrainedTokenizerBase, *, stop: threading.Event | None = None
) -> ProblemSet:
    """Read, tokenize and check every problem of ``split``, batch by batch.

    Args:
        stop: another thread may set it; loading then ends with `CancelledError`.

    Raises:
        DataError: a file or a row is wrong, or no problem is left.
        ConfigError: ``data.type`` is unknown, or more sums are asked for than exist.
    """
    render, meter = prompt_renderer(config, tokenizer), Meter()
    questions, source = _questions(config, split, meter)
    limit = config.max_prompt_length if config.filter_prompt_by_length else None
    encode = encoder(tokenizer, add_special_tokens=not config.apply_chat_template, limit=limit)
    kept, fingerprint = ProblemStore(), Fingerprint(with_metadata=bool(config.metadata_keys))
    num_rows, shortest = 0, math.inf
    with Progress(source, _num_bytes(config, split), meter) as progress:
        batches = in_background(_rendered(questions, render), encode, num_threads=max(1, config.num_workers))
        for part, prompts, token_ids in batches:
            if stop is not None and stop.is_set():
                raise CancelledError
            for question, prompt, ids in zip(part, prompts, token_ids, strict=True):
                num_rows += 1
                if ids is None:
                    continue
                shortest = min(shortest, len(ids))
                if _fits(question, ids, config):
                    text, answer = encode_text(prompt, question.where), encode_text(question.answer, question.where)
                    kept.append(text, answer, ids, path=question.path, line=question.line, metadata=question.metadata)
                    fingerprint.add(text, answer, ids, question.metadata)
            progress.update(num_rows)
    if not kept:
        raise DataError(_nothing_left(source, num_rows, shortest, config))
    return ProblemSet(
        problems=kept,
        fingerprint=fingerprint.hexdigest(),
        num_filtered=num_rows - len(kept),
        source=source,
        max_token_id=kept.max_token_id,
    )


def _questions(config: DataConfig, split: Split, meter: Meter) -> tuple[Iterable[Question], str]:
    """The questions of the split, and what they come from, for messages."""
    if config.type == "arithmetic":
        return generate_sums(config.arithmetic, split), "arithmetic"
    if config.type == "reasoning_gym":
        return generate_questions(config.reasoning_gym, split), f"reasoning_gym:{config.reasoning_gym.task}"
    if config.type != "math":
        raise ConfigError(f"data.type: {config.type!r}; choose math, arithmetic or reasoning_gym")
    rows = read_rows(_paths(config, split), f"data.{split}_data_paths", meter)
    return map(question_reader(config), rows), ", ".join(map(display_name, _paths(config, split)))


def _paths(config: DataConfig, split: Split) -> list[str]:
    return config.train_data_paths if split == "train" else config.val_data_paths


def _num_bytes(config: DataConfig, split: Split) -> int:
    """The size of the files that are read."""
    return num_bytes(_paths(config, split)) if config.type == "math" else 0


def _rendered(questions: Iterable[Question], render: Renderer) -> Iterator[tuple[list[Question], list[str]]]:
    """Questions with their prompts, in batches of `_BATCH_ROWS` rows, or fewer if the rows are long."""
    batch: list[Question] = []
    num_characters = 0
    for question in questions:
        batch.append(question)
        content = question.content
        num_characters += len(content) if isinstance(content, str) else sum(len(turn["content"]) for turn in content)
        if len(batch) == _BATCH_ROWS or num_characters >= _BATCH_CHARACTERS:
            yield batch, _render_checked(batch, render)
            batch, num_characters = [], 0
    if batch:
        yield batch, _render_checked(batch, render)


def _render_checked(questions: Sequence[Question], render: Renderer) -> list[str]:
    """The prompts, each of which the tokenizer can read."""
    prompts = render(questions)
    for question, prompt in zip(questions, prompts, strict=True):
        if not prompt.isascii():
            encode_text(prompt, question.where)
    return prompts


def _fits(question: Question, ids: TokenIds, config: DataConfig) -> bool:
    """Whether the prompt is kept.

    Raises:
        DataError: the prompt has no tokens, or is too long and ``data.filter_prompt_by_length`` is off.
    """
    if not ids:
        raise DataError(f"{question.where}: the prompt has no tokens; remove the row or set data.prompt_key=...")
    if len(ids) <= config.max_prompt_length:
        return True
    if config.filter_prompt_by_length:
        return False
    raise DataError(
        f"{question.where}: the prompt has {len(ids)} tokens, data.max_prompt_length is {config.max_prompt_length}; "
        "raise it, or leave such rows out with data.filter_prompt_by_length=true"
    )


def _nothing_left(source: str, num_rows: int, shortest: float, config: DataConfig) -> str:
    if not num_rows:
        return f"{source}: no rows; name files (or a number of problems) with at least one"
    longer = f"longer than data.max_prompt_length={config.max_prompt_length} tokens"
    known = "" if math.isinf(shortest) else f" (the shortest one that was counted has {shortest})"
    return f"{source}: no problems left, all {num_rows} prompts are {longer}{known}; raise it"
