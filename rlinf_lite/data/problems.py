"""The problems of a split, in order: rows or generated ones, put into words, tokenized, checked, fingerprinted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Literal

from rlinf_lite.config import ConfigError, DataConfig
from rlinf_lite.data.arithmetic import sums
from rlinf_lite.data.errors import DataError
from rlinf_lite.data.prompts import prompt_writer
from rlinf_lite.data.questions import Question, canonical, question_reader
from rlinf_lite.data.reasoning_gym import items
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
    """sha256 (hex) over prompts, their token ids, answers and ``data.metadata_keys``, in order; not over paths."""
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
    write = prompt_writer(config, tokenizer)
    questions, source = _questions(config, split)
    prompts = [write(question) for question in questions]
    token_ids = tokenize(
        prompts, tokenizer, add_special_tokens=not config.apply_chat_template, num_threads=config.num_workers
    )
    kept = [found for found in zip(questions, prompts, token_ids, strict=True) if _usable(found[0], found[2], config)]
    if not kept:
        raise DataError(_nothing_left(source, token_ids, config))
    problems = tuple(_problem(index, *found) for index, found in enumerate(kept))
    return ProblemSet(
        problems=problems,
        fingerprint=fingerprint(problems, with_metadata=bool(config.metadata_keys)),
        num_filtered=len(questions) - len(kept),
        source=source,
    )


def fingerprint(problems: Iterable[Problem], *, with_metadata: bool = False) -> str:
    """sha256 (hex) over what the model sees and is judged by, in order; ids and sources do not count."""
    digest = hashlib.sha256()
    for problem in problems:
        fields = [problem.prompt, problem.answer, ",".join(map(str, problem.prompt_ids))]
        for field in [*fields, canonical(problem.metadata)] if with_metadata else fields:
            encoded = field.encode("utf-8")
            digest.update(f"{len(encoded)}:".encode() + encoded)
    return digest.hexdigest()


def _questions(config: DataConfig, split: Split) -> tuple[Sequence[Question], str]:
    if config.type == "arithmetic":
        return sums(config.arithmetic, split), "arithmetic"
    if config.type == "reasoning_gym":
        return items(config.reasoning_gym, split), f"reasoning_gym:{config.reasoning_gym.task}"
    if config.type != "math":
        raise ConfigError(f"data.type: {config.type!r}; choose math, arithmetic or reasoning_gym")
    paths = config.train_data_paths if split == "train" else config.val_data_paths
    read = question_reader(config)
    rows = read_rows(paths, f"data.{split}_data_paths")
    source = ", ".join(path if path.startswith("hf:") else PurePath(path).name for path in paths)
    return [read(row) for row in rows], source


def _usable(question: Question, ids: TokenIds, config: DataConfig) -> bool:
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


def _problem(index: int, question: Question, prompt: str, ids: TokenIds) -> Problem:
    return Problem(
        problem_id=index,
        prompt=prompt,
        answer=question.answer,
        prompt_ids=ids,
        source=question.source,
        metadata=question.metadata,
    )


def _nothing_left(source: str, token_ids: Sequence[TokenIds], config: DataConfig) -> str:
    if not token_ids:
        return f"{source}: no rows; name files (or a number of problems) with at least one"
    longer = f"longer than data.max_prompt_length={config.max_prompt_length} tokens"
    shortest = min(map(len, token_ids))
    return f"{source}: nothing left, all {len(token_ids)} prompts are {longer} (the shortest has {shortest}); raise it"
