"""Peak memory of one unit, forward and backward, with whole logits (plain autograd) and with the head of `ScoredModel`.

    python benchmarks/head_memory.py
    python benchmarks/head_memory.py --rows 4 --length 256 --layers 0

The model has the shape of Qwen2.5-0.5B (vocabulary 151,936, hidden size 896) with few layers and random weights in
float32 on the CPU; the loss has the entropy bonus. With 0 layers, what is left is the embedding and the head. Each way
runs in a process of its own, and each prints the resident memory before the unit, its peak, and processor time.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

WAYS = ("whole", "head")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--length", type=int, default=512, help="tokens per row (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--way", choices=WAYS, help="measure this one, in this process (default: both)")
    options = parser.parse_args()
    if options.way:
        measure(options.way, options.rows, options.length, options.layers)
        return 0
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        subprocess.run(command, check=True)
    return 0


def measure(way: str, rows: int, length: int, layers: int) -> None:
    """Print what one forward and backward pass adds to this process's resident memory."""
    import psutil
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from rlinf_lite import numerics
    from rlinf_lite.models.scored import ScoredModel
    from rlinf_lite.models.segments import FlatTokens
    from rlinf_lite.types import Segments

    numerics.fix("cpu")
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    ids_BT = torch.randint(0, config.vocab_size, (rows, length + 1))
    before, start = psutil.Process().memory_info().rss, time.process_time()
    if way == "whole":
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
        all_BTV = logits_BTV.log_softmax(-1)
        logprobs = all_BTV.gather(2, ids_BT[:, 1:, None]).squeeze(2)
        entropy = -(all_BTV.exp() * all_BTV).sum(-1)
    else:
        starts = torch.arange(rows) * (length + 1)
        segments = Segments(start_S=starts, stop_S=starts + length + 1, parent_S=torch.full((rows,), -1))
        tokens = FlatTokens.of(ids_BT.flatten(), torch.arange(length + 1).repeat(rows), segments)
        source_M = torch.arange(ids_BT.numel()).view_as(ids_BT)[:, :-1].flatten()
        given = tokens.ids_N, tokens.positions_N, tokens.layout, source_M, ids_BT[:, 1:].flatten()
        logprobs, entropy = ScoredModel(model)(*given, 1.0, True)
        assert entropy is not None
    loss = -(logprobs + 0.001 * entropy).mean()
    loss.backward()
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{way:>6}: {before / 1e9:.2f} GB before, peak {peak / 1e9:.2f} GB: the unit adds "
        f"{(peak - before) / 1e9:.2f} GB; {seconds:.0f} s of processor time; loss {loss.item():.7f}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
