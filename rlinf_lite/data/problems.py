"""The problems of a split, in order: rows or generated sums, tokenized, checked for length, fingerprinted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Literal

from rlinf_lite.config import ConfigError, DataConfig
from rlinf_lite.data.arithmetic import sums
from rlinf_lite.data.errors import DataError
from rlinf_lite.data.prompts import Question, question_reader
from rlinf_lite.data.sources import read_rows
from rlinf_lite.data.tokenization import TokenIds, tokenize
from rlinf_lite.types import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "val"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProblemSet:
    """The problems of a split."""

    problems: tuple[Problem, ...]
    """``problems[i].problem_id == i``."""
    fingerprint: str
    """sha256 (hex) over prompts, their token ids and answers, in order; not over paths."""
    num_filtered: int
    """Rows left out because their prompt is longer than ``data.max_prompt_length``."""
    source: str
    """For messages: ``"train.jsonl, more.parquet"``."""


def load_problems(config: DataConfig, split: Split, tokenizer: PreTrainedTokenizerBase) -> ProblemSet:
    """Read, tokenize and check every problem of ``split``.

    Raises:
        DataError: something is wrong with a file or a row, or no problem is left.
        ConfigError: an unknown ``data.type``, or more generated sums than there are.
    """
    questions, source = _questions(config, split, tokenizer)
    token_ids = tokenize(
        [question.prompt for question in questions],
        tokenizer,
        add_special_tokens=not config.apply_chat_template,
        num_threads=config.num_workers,
    )
    pairs = list(zip(questions, token_ids, strict=True))
    kept = [(question, ids) for question, ids in pairs if _usable(question, ids, config)]
    if not kept:
        raise DataError(_nothing_left(source, len(pairs), config))
    problems = _numbered(kept)
    num_filtered = len(pairs) - len(kept)
    return ProblemSet(problems=problems, fingerprint=fingerprint(problems), num_filtered=num_filtered, source=source)


def fingerprint(problems: Iterable[Problem]) -> str:
    """sha256 (hex) over what the model sees and is judged by, in order; ids and sources do not count."""
    digest = hashlib.sha256()
    for problem in problems:
        for field in (problem.prompt, problem.answer, ",".join(map(str, problem.prompt_ids))):
            encoded = field.encode("utf-8")
            digest.update(f"{len(encoded)}:".encode() + encoded)
    return digest.hexdigest()


def _questions(config: DataConfig, split: Split, tokenizer: PreTrainedTokenizerBase) -> tuple[Sequence[Question], str]:
    if config.type == "arithmetic":
        return sums(config.arithmetic, split), "arithmetic"
    if config.type != "math":
        raise ConfigError(f"data.type: {config.type!r}; choose math or arithmetic")
    paths = config.train_data_paths if split == "train" else config.val_data_paths
    read = question_reader(config, tokenizer)
    rows = read_rows(paths, f"data.{split}_data_paths")
    source = ", ".join(path if path.startswith("hf:") else PurePath(path).name for path in paths)
    return [read(row) for row in rows], source


def _usable(question: Question, ids: TokenIds, config: DataConfig) -> bool:
    if not question.prompt or not ids:
        raise DataError(f"{question.where}: the prompt is empty; remove the row or set data.prompt_key=...")
    if len(ids) <= config.max_prompt_length:
        return True
    if config.filter_prompt_by_length:
        return False
    raise DataError(
        f"{question.where}: the prompt has {len(ids)} tokens, data.max_prompt_length is {config.max_prompt_length}; "
        "raise it, or leave such rows out with data.filter_prompt_by_length=true"
    )


def _numbered(kept: Sequence[tuple[Question, TokenIds]]) -> tuple[Problem, ...]:
    return tuple(
        Problem(problem_id=index, prompt=asked.prompt, answer=asked.answer, prompt_ids=ids, source=asked.source)
        for index, (asked, ids) in enumerate(kept)
    )


def _nothing_left(source: str, num_rows: int, config: DataConfig) -> str:
    if not num_rows:
        return f"{source}: no rows; name files (or a number of sums) with at least one"
    longer = f"longer than data.max_prompt_length={config.max_prompt_length} tokens"
    return f"{source}: nothing left, all {num_rows} prompts are {longer}; raise it"
