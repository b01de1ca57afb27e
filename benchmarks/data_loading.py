"""Measure how long 200 MB of prompts take to load, compared with the bare tokenizer on the same texts.

Makes two files in a temporary directory, short rows and long prompts, and a byte-level BPE tokenizer trained on words
like theirs. Then, each in a process of its own, loads each file as a run does, and encodes its prompts with the bare
tokenizer's ``encode_batch``. Prints seconds, CPU seconds, and the largest memory of the process.

    python benchmarks/data_loading.py [--megabytes 200]
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlinf_lite.config import DataConfig
from rlinf_lite.data import load_problems

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS_IN_A_ROW = {"short": (8, 30), "long": (3000, 15_000)}
SYLLABLES = "ba ter in son mo ly der ap ple ing com pu ta tion num ber the how ma ny"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure)
        return
    with tempfile.TemporaryDirectory() as scratch:
        words = vocabulary()
        train_tokenizer(words, Path(scratch, "tokenizer"))
        for kind in WORDS_IN_A_ROW:
            data = Path(scratch, f"{kind}.jsonl")
            write_rows(words, kind, data, options.megabytes * 1e6)
            for what in ("load", "bare"):  # each in a process of its own: memory is counted from its start
                command = [sys.executable, __file__, "--measure", what, str(data), str(Path(scratch, "tokenizer"))]
                subprocess.run(command, check=True)


def vocabulary() -> list[str]:
    """20,000 words; the first ones are used most."""
    draw = random.Random(0)
    return ["".join(draw.choices(SYLLABLES.split(), k=draw.randint(1, 4))) for _ in range(20_000)]


def text(words: list[str], draw: random.Random, num_words: int) -> str:
    return " ".join(words[int(len(words) * draw.random() ** 3)] for _ in range(num_words))


def train_tokenizer(words: list[str], path: Path) -> None:
    core = Tokenizer(models.BPE())
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN), "isolated"), by_bytes])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=16_000, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator((text(words, random.Random(row), 50) for row in range(5000)), trainer)
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(path)


def write_rows(words: list[str], kind: str, path: Path, num_bytes: float) -> None:
    draw, written = random.Random(1), 0
    with path.open("w") as file:
        while written < num_bytes:
            row = {
                "prompt": text(words, draw, draw.randint(*WORDS_IN_A_ROW[kind])),
                "answer": str(draw.randrange(1000)),
            }
            written += file.write(json.dumps(row) + "\n")


def measure(what: str, data: str, tokenizer_dir: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    seconds, cpu = time.monotonic(), time.process_time()
    if what == "load":
        loaded = load_problems(DataConfig(train_data_paths=[data]), "train", tokenizer)
        result = f"{len(loaded.problems):,} kept, {loaded.num_filtered:,} left out"
    else:
        result = f"{encode_all(tokenizer.backend_tokenizer.encode_batch, prompts(data)):,} tokens"
    seconds, cpu = time.monotonic() - seconds, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    name, size = Path(data).name, Path(data).stat().st_size / 1e6
    print(f"{what:5} {name:12} {size:6.1f} MB {seconds:7.1f} s {cpu:7.1f} CPU s {peak:6.0f} MiB  {result}", flush=True)


def prompts(data: str) -> Iterator[list[str]]:
    """In batches of about a megabyte."""
    batch: list[str] = []
    num_characters = 0
    with open(data, encoding="utf-8") as file:
        for line in file:
            batch.append(json.loads(line)["prompt"])
            num_characters += len(batch[-1])
            if num_characters >= 1 << 20:
                yield batch
                batch, num_characters = [], 0
    yield batch


def encode_all(encode: Callable[[list[str]], list], batches: Iterator[list[str]]) -> int:
    return sum(len(encoding.ids) for batch in batches for encoding in encode(batch))


if __name__ == "__main__":
    main()
