"""Rows 3 and 4: an update of SmolLM2-135M's shape beside plain torch, and a shared prompt beside one prompt per row.

    python benchmarks/update.py [--only 3 4] [--rounds 5] [--out FILE]

    3  8 responses of 255 tokens to prompts of one token, against the same step in plain torch: transformers' model with
       its own attention, fused AdamW, one process, as many threads
    4  a group of 8 responses of 64 tokens to one prompt of 512 tokens, against units of one row, with one thread; also
       compares all bits of the log-probs, and the gradients

`--layers 4` takes a smaller model, to see that it works.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import _random_model
import torch
from _paired import Row, arguments, finish, in_turn
from _updates import Ours, Plain, Processes

THREADS = 2
APART = {"prompt_lengths": [1] * 8, "group_size": 1, "lengths": [255] * 8}
SHARED = {"prompt_lengths": [512], "group_size": 8, "lengths": [64] * 8}


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--only", nargs="+", choices=("3", "4"), default=["3", "4"], help="default: both")
    parser.add_argument("--layers", type=int, default=30, help="of the model (default: %(default)s)")
    options = parser.parse_args()
    measures = {"3": beside_plain_torch, "4": shared_prompt}
    with tempfile.TemporaryDirectory() as directory:
        sizes = {"num_hidden_layers": options.layers}
        model_dir = _random_model.save("smollm2-135m", Path(directory), words=True, **sizes)
        rows = [measures[number](model_dir, options.rounds) for number in options.only]
    finish(rows, options.out)


def beside_plain_torch(model_dir: Path, rounds: int) -> Row:
    config = _random_model.config_of("smollm2-135m")
    tokens = 8 * 256
    ours = Processes(Ours, model_dir, config.vocab_size, THREADS, threads=THREADS)
    plain = Processes(Plain, model_dir, config.vocab_size, threads=THREADS, plainly=True)
    row = Row(
        number="3",
        work=f"an update of SmolLM2-135M's shape, 8 x 256 tokens, fp32, one rank of {THREADS} threads",
        other="the same in plain torch",
        goal=0.95,
        at_most=False,
        unit="tokens/s",
    )
    ours.call("step", APART, 8), plain.call("step", APART)
    in_turn(row, lambda: tokens / ours.call("step", APART, 8)[0], lambda: tokens / plain.call("step", APART)[0], rounds)
    (peak,), num = plain.call("peak"), _num_parameters(model_dir)
    for name, speed in (("ours", max(row.ours)), ("plain torch", max(row.others))):
        row.details[f"share of the matmul peak, {name}"] = f"{6 * num * speed / peak:.2f}"
    row.details["matmul peak, GFLOP/s"] = round(peak / 1e9)
    for each in (ours, plain):
        each.close()
    return row


def shared_prompt(model_dir: Path, rounds: int) -> Row:
    config = _random_model.config_of("smollm2-135m")
    ours = Processes(Ours, model_dir, config.vocab_size, 1)
    row = Row(
        number="4",
        work="an update of SmolLM2-135M's shape with a group of 8 below a prompt of 512 tokens, 64 tokens each",
        other="units of one row, each with its prompt",
        goal=3.0,
        at_most=False,
        unit="responses/s",
    )
    equal, difference = ours.call("compare", SHARED, 8, 1)[0]
    in_turn(row, lambda: 8 / ours.call("step", SHARED, 8)[0], lambda: 8 / ours.call("step", SHARED, 1)[0], rounds)
    row.details["log-probs bitwise identical"] = equal
    row.details["difference of the gradients, by their norm"] = f"{difference:.1e} (at most 1e-6)"
    ours.close()
    if not equal or difference > 1e-6:
        raise SystemExit(f"{row.text()}\nthe numbers of a shared prompt are not those of rows alone")
    return row


def _num_parameters(model_dir: Path) -> int:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir))
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
