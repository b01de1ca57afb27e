"""Row 12: responses of uneven lengths beside as many tokens in responses of one length.

    python benchmarks/uneven.py [--rounds 5] [--out FILE]

32 responses, 8 to each prompt of 64 tokens: log-normal lengths with mean 128 and at most 512, beside 128 each. The
update is that of two ranks with units of 4 responses. A detail shows the same of generation: one engine with 16 slots.
The model has SmolLM2-135M's layers, but only 8 of them and 8,192 tokens.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import _random_model
import numpy as np
from _paired import Row, arguments, finish, in_turn
from _updates import Ours, Processes, responses

from rlinf_lite import numerics
from rlinf_lite.rollout.builtin import BuiltinEngine
from rlinf_lite.rollout.host_decoder import HostDecoder
from rlinf_lite.types import GenerationBatch, Sampling

VOCABULARY, LAYERS = 8192, 8
MEAN, MOST, SIGMA = 128, 512, 0.8
NUM_PROMPTS, GROUP, ROWS_PER_UNIT, SLOTS = 4, 8, 4, 16
SIZES: dict[str, Any] = {"num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
EOS = 2


def main() -> None:
    options = arguments(__doc__, rounds=5).parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model_dir = _random_model.save("smollm2-135m", Path(directory), words=True, **SIZES)
        row = updates(model_dir, options.rounds)
    row.details["generation, uneven by even"] = f"{generation(options.rounds):.3f}"
    finish([row], options.out)


def uneven_lengths() -> list[int]:
    """Log-normal, limited to `MOST`, and scaled to the mean exactly."""
    drawn = np.random.default_rng(1).lognormal(0.0, SIGMA, NUM_PROMPTS * GROUP)
    lengths = np.minimum(drawn / drawn.mean() * MEAN, MOST).round().astype(int)
    while missing := MEAN * len(lengths) - int(lengths.sum()):
        room = np.flatnonzero(lengths < MOST)[: abs(missing)]
        lengths[room] += 1 if missing > 0 else -1
    return [int(length) for length in lengths]


def arguments_of(lengths: list[int]) -> dict[str, Any]:
    return {"prompt_lengths": [64] * NUM_PROMPTS, "group_size": GROUP, "lengths": lengths}


def updates(model_dir: Path, rounds: int) -> Row:
    uneven, even = arguments_of(uneven_lengths()), arguments_of([MEAN] * NUM_PROMPTS * GROUP)
    row = Row(
        number="12",
        work=f"an update with responses of {min(uneven['lengths'])} to {max(uneven['lengths'])} tokens, 2 ranks",
        other=f"as many tokens in responses of {MEAN}",
        goal=1.15,
    )
    ours = Processes(Ours, model_dir, VOCABULARY, 1, number=2)
    for groups in (uneven, even):
        ours.call("step", groups, ROWS_PER_UNIT)
    step = partial(ours.call, "step")
    in_turn(row, lambda: max(step(uneven, ROWS_PER_UNIT)), lambda: max(step(even, ROWS_PER_UNIT)), rounds)
    ours.close()
    return row


class GivenLengths(HostDecoder):
    """Ends each row after a given number of tokens."""

    lengths: np.ndarray
    max_drafted = 0  # a draft that comes true could lead past the end

    def _draw(self, rows: Any, *others: Any) -> np.ndarray:
        drawn_R = super()._draw(rows, *others)
        ends_R = rows.t_R + 1 == self.lengths[rows.origin_R]
        return np.where(ends_R, EOS, np.where(drawn_R == EOS, EOS + 2, drawn_R))


def generation(rounds: int) -> float:
    """Seconds of a batch with uneven lengths, by those with even ones: the median of pairs."""
    numerics.fix("cpu")
    model = _random_model.make("smollm2-135m", **SIZES).float()
    given: dict[str, Any] = {"eos_ids": frozenset({EOS}), "return_logprobs": False, "max_rows": SLOTS}
    engine = BuiltinEngine(model, _random_model.word_tokenizer(VOCABULARY), **given)
    decoder = engine._decoder = GivenLengths(
        engine._decoder._forward, eos_ids=given["eos_ids"], with_logprobs=False, max_rows=SLOTS
    )
    sampling = Sampling(
        do_sample=True, temperature=1.0, top_k=-1, top_p=1.0, repetition_penalty=1.0, max_new_tokens=MOST
    )
    prompts = tuple(
        group.prompt for group in responses(**arguments_of([1] * NUM_PROMPTS * GROUP), vocab_size=VOCABULARY)
    )
    batch = GenerationBatch(
        stream="train", step=1, index=0, prompts=prompts, group_size=GROUP, sampling=sampling, seed=1
    )

    def seconds(lengths: list[int]) -> float:
        decoder.lengths = np.array(lengths)
        began = time.perf_counter()
        groups = engine.generate(batch)
        assert [len(r.token_ids) for group in groups for r in group.responses] == lengths
        return time.perf_counter() - began

    uneven, even = uneven_lengths(), [MEAN] * NUM_PROMPTS * GROUP
    return statistics.median(seconds(uneven) / seconds(even) for _ in range(rounds))


if __name__ == "__main__":
    main()
