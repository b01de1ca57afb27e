"""The ``data`` section: problems, prompts and batches."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from pydantic import AfterValidator, Field

from rlinf_lite.config.fields import Count, CountOrZero, Neutral, PathText, Section, Seed

_SET_BY_US = {
    "add_generation_prompt",
    "continue_final_message",
    "conversation",
    "return_dict",
    "return_tensors",
    "tokenize",
}
"""Arguments of ``apply_chat_template`` that we pass, or with which it would not return a text."""


def _task_settings(settings: dict[str, Any]) -> dict[str, Any]:
    for name in ("seed", "size"):
        if name in settings:
            raise ValueError(f"{name!r} is a key of its own; set data.reasoning_gym.{name}")
    return settings


def _sum_template(text: str) -> str:
    if "{a}" not in text or "{b}" not in text:
        raise ValueError("no place for the numbers; write {a} and {b} there")
    return text


def _template(text: str) -> str:
    if "{prompt}" not in text:
        raise ValueError("no place for the question; write {prompt} there")
    return text


def _examples(shots: list[Any]) -> list[Any]:
    for number, shot in enumerate(shots, start=1):
        if not isinstance(shot, dict) or shot.keys() != {"question", "answer"}:
            raise ValueError(f"example {number} is {shot!r:.80}; write {{question: ..., answer: ...}}")
    return shots


def _template_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    if reserved := sorted(arguments.keys() & _SET_BY_US):
        raise ValueError(f"{reserved[0]!r} is decided here; remove it")
    return arguments


class ArithmeticConfig(Section):
    num_digits: Annotated[int, Ge(1), Le(9)] = 2
    """Digits of each operand. Pairs of longer ones cannot be numbered in 64 bits."""
    num_problems: Count = 2048
    """Sums to train on."""
    num_val_problems: CountOrZero = 256
    """Held-out sums, disjoint from the training ones."""
    question: Annotated[str, AfterValidator(_sum_template)] = "{a}+{b}="
    """Text of a question; ``{a}`` and ``{b}`` are replaced by the numbers."""


class ReasoningGymConfig(Section):
    task: str | None = None
    """Name of a task, for example ``chain_sum``."""
    size: Count = 2048
    """Items to train on."""
    val_size: CountOrZero = 256
    """Held-out items, other than the training ones (but a small task may ask the same question twice)."""
    seed: Annotated[int, Ge(0), Le(2**63 - 1)] = 42
    """Seed of the items."""
    config: Annotated[dict[str, Any], AfterValidator(_task_settings)] = {}
    """Settings of the task, for example ``{max_terms: 3}``."""


class DataConfig(Section):
    type: Literal["math", "arithmetic", "reasoning_gym"] = "math"
    """``math``: rows of ``train_data_paths``; ``arithmetic``: generated sums; ``reasoning_gym``: items of a task."""
    arithmetic: ArithmeticConfig = Field(default_factory=ArithmeticConfig)
    reasoning_gym: ReasoningGymConfig = Field(default_factory=ReasoningGymConfig)
    max_prompt_length: Count = 1024
    """Largest number of tokens in a prompt."""
    filter_prompt_by_length: bool = True
    """Leave out rows whose prompt is longer than ``max_prompt_length``; false: such a row is an error."""
    rollout_batch_size: Count = 16
    """Prompts per step."""
    val_rollout_batch_size: Count | None = None
    """Prompts in a validation batch; null: as many as ``rollout_batch_size``."""
    num_workers: Neutral[Annotated[int, Ge(0), Le(1024)]] = 0
    """Batches of rows that are tokenized at the same time at the start, each on the tokenizer's own threads; 0: one."""
    shuffle: bool = True
    """Take the training problems in random order, another one in each epoch."""
    seed: Seed = 1234
    """Seed of the order of the training problems."""
    train_data_paths: Neutral[list[PathText]] = []
    """jsonl, json, csv or parquet files, directories written by ``datasets.save_to_disk``, or
    ``hf:NAME[:CONFIG]:SPLIT``, where a part of a split is ``train[:100]``."""
    val_data_paths: Neutral[list[PathText]] = []
    """As ``train_data_paths``, for validation."""
    prompt_key: str = "prompt"
    """Where the question is in a row, a text or a list of chat messages: ``key``, or ``key.of.nested.objects``."""
    answer_key: str | None = "answer"
    """Where the answer is in a row; null, for a reward that needs none: no answers are read."""
    metadata_keys: list[str] = []
    """What a ``custom`` reward gets of a row besides, in its ``metadata``."""
    prompt_template: Annotated[str, AfterValidator(_template)] = "{prompt}"
    """Text around each question; only ``{prompt}`` is replaced."""
    system_prompt: str | None = None
    """A first message with the role ``system``; without chat template: a first paragraph."""
    few_shot: Annotated[list[Any], AfterValidator(_examples)] = []
    """Examples before each question, ``[{question: ..., answer: ...}]``: turns of the chat; without chat template:
    paragraphs."""
    apply_chat_template: bool = False
    """Format prompts with the tokenizer's chat template."""
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_template_arguments)] = {}
    """Arguments of the tokenizer's chat template besides the messages, for example ``{enable_thinking: false}``."""
