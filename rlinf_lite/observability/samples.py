"""Sample responses for TensorBoard and wandb: which rows of ``rollouts.jsonl`` they show, and as what table.

The rows are read from the file, so a resume that shows older steps again shows the same rows.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlinf_lite.observability.jsonl import rows_of_step
from rlinf_lite.printable import replace_surrogates

ROLLOUTS_FILE = "rollouts.jsonl"
SAMPLE_INTERVAL = 10
"""Steps between tables. The first step also has one."""
_NUM_ROWS = 8
_LONGEST_TEXT = 2000
_FUNCTION = "reward/"
"""How the keys of a row begin that hold the score of one of ``reward.functions``."""
_MARKDOWN = {ord(sign): f"&#{ord(sign)};" for sign in string.punctuation} | {ord("\n"): "<br>", ord("\r"): None}


Cell = int | float | str | None


def samples_of(log_path: Path, step: int) -> list[dict[str, Cell]]:
    """Rows of the table of ``step``, by column, all with the same columns; empty if the step has no table."""
    if step != 1 and step % SAMPLE_INTERVAL != 0:
        return []
    rows = list(rows_of_step(log_path / ROLLOUTS_FILE, step, _NUM_ROWS))
    functions = dict.fromkeys(key for row in rows for key in row if key.startswith(_FUNCTION))
    return [_cells(row) | {key: row.get(key) for key in functions} for row in rows]


def prompt_of(row: Mapping[str, Any]) -> str:
    """The prompt's text, or its token ids in files that do not hold the text."""
    return row["prompt"] if "prompt" in row else f"tokens {' '.join(map(str, row['prompt_ids']))}"


def _cells(row: Mapping[str, Any]) -> dict[str, Cell]:
    return {
        "step": row["step"],
        "prompt_id": row["prompt_id"],
        "sample": row["sample"],
        "prompt": replace_surrogates(prompt_of(row)),
        "response": replace_surrogates(row["text"]),
        "reward": row["reward"],
    }


def markdown_table(rows: Sequence[Mapping[str, Cell]]) -> str:
    """A Markdown table for TensorBoard's text tab. Texts are escaped, and truncated if they are long."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([_cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: Cell) -> str:
    text = str(value)
    return to_markdown(text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} ... ({len(text)} characters)")


def to_markdown(text: str) -> str:
    """``text`` in Markdown that shows it literally, with its line breaks."""
    return replace_surrogates(text).translate(_MARKDOWN)
