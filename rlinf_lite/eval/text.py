"""Console output of an evaluation: progress, and the table of results."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from rlinf_lite.config import SamplingConfig
from rlinf_lite.eval.log import Row


class Progress:
    """A bar on a terminal; elsewhere a line whenever another tenth of the problems is done.

    Args:
        rows: those of an earlier, interrupted process.
    """

    def __init__(self, rows: Sequence[Row], num_problems: int) -> None:
        self._num_problems, self._num_done, self._num_tokens = num_problems, 0, 0
        self._num_correct, self._num_responses, self._started = 0, 0, time.monotonic()
        self._bar = tqdm(
            total=num_problems,
            unit="problem",
            file=sys.stderr,
            dynamic_ncols=True,
            leave=False,
            disable=not sys.stderr.isatty(),
        )
        self._count(rows)
        self._num_tokens = 0  # the speed is that of this process

    def __call__(self, rows: Sequence[Row]) -> None:
        """Add the rows of one generation batch."""
        before = self._num_done
        self._count(rows)
        self._bar.set_postfix_str(self._so_far())
        if self._bar.disable and before * 10 // self._num_problems < self._num_done * 10 // self._num_problems:
            line = f"{self._num_done:>6}/{self._num_problems} problems, {self._so_far()}"
            print(line, file=sys.stderr, flush=True)

    def _count(self, rows: Sequence[Row]) -> None:
        responses = [response for row in rows for response in row["responses"]]
        self._num_done += len(rows)
        self._num_tokens += sum(response["num_tokens"] for response in responses)
        self._num_correct += sum(response["correct"] for response in responses)
        self._num_responses += len(responses)
        self._bar.update(len(rows))

    def _so_far(self) -> str:
        return f"accuracy {self._num_correct / self._num_responses:.4f}, {self.tokens_per_second:.0f} tokens/s"

    @property
    def tokens_per_second(self) -> float:
        return self._num_tokens / max(time.monotonic() - self._started, 1e-9)

    def close(self) -> None:
        self._bar.close()


def sampling_text(params: SamplingConfig, num_samples: int) -> str:
    """Describe the decoding: ``greedy, at most 256 new tokens``."""
    if params.do_sample:
        samples = "1 sample" if num_samples == 1 else f"{num_samples} samples"
        parts = [f"{samples} per problem", f"temperature {params.temperature:g}"]
        if params.top_p < 1:
            parts.append(f"top_p {params.top_p:g}")
        if params.min_p > 0:
            parts.append(f"min_p {params.min_p:g}")
        if params.top_k > 0:
            parts.append(f"top_k {params.top_k}")
    else:
        parts = ["greedy"]
    if params.repetition_penalty != 1:
        parts.append(f"repetition penalty {params.repetition_penalty:g}")
    return ", ".join([*parts, f"at most {params.max_new_tokens} new tokens"])


def table(found: Mapping[str, Any]) -> list[str]:
    """The results as lines of text."""
    num_responses = found["num_problems"] * found["num_samples"]
    error = f" +- {found['accuracy_stderr']:.4f}" if found["accuracy_stderr"] is not None else ""
    share = f"{round(found['accuracy'] * num_responses)} of {num_responses} responses"
    lines = [f"accuracy    {found['accuracy']:.4f}{error}   {share}"]
    if "pass@k" in found:
        lines.append(f"{'k':<12}" + "".join(f"{k:>9}" for k in found["pass@k"]))
        for name in ("pass@k", "maj@k"):
            lines.append(f"{name:<12}" + "".join(f"{value:>9.4f}" for value in found[name].values()))
    lines.append(
        f"responses   {found['response_tokens_mean']:.1f} tokens on average, {found['response_tokens_max']} at most; "
        f"{found['cut_fraction']:.1%} truncated"
    )
    if functions := [f"{key} {found[key]:.4f}" for key in found if key.startswith("reward/")]:
        lines.append(f"reward      {found['reward_mean']:.4f} on average; {', '.join(functions)}")
    if found["ungraded"]:
        lines.append(f"ungraded    {found['ungraded']} could not be generated or graded, and count as wrong")
    if given_up := found["verifier_errors"] - found["ungraded"]:
        lines.append(f"verifier    gave up on {given_up}, which count as wrong")
    return lines
