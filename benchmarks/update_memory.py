"""Row 10: peak memory of a rank in an update, beside parameters, gradients, optimizer state and activations.

    python benchmarks/update_memory.py [--rounds 3] [--out FILE]

SmolLM2-135M's shape in fp32 on two ranks; each has a unit of 8 responses of 255 tokens to prompts of one token. What is
counted by hand: 16 bytes per parameter, divided by the ranks, and what a plain Llama keeps of the unit's tokens for the
backward pass.
Not counted: gathered weights, their gradients before they are reduced, logits, what the allocator cannot return.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import _random_model
from _paired import Row, arguments, finish, in_turn
from _updates import Ours, Processes
from transformers import PreTrainedConfig

RANKS, TOKENS, ROWS = 2, 256, 8
WORK = {"prompt_lengths": [1] * ROWS * RANKS, "group_size": 1, "lengths": [TOKENS - 1] * ROWS * RANKS}


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--layers", type=int, default=30, help="of the model (default: %(default)s)")
    options = parser.parse_args()
    config = _random_model.config_of("smollm2-135m", num_hidden_layers=options.layers)
    state, kept = state_bytes(config), activation_bytes(config, ROWS * TOKENS)
    row = Row(
        number="10",
        work=f"peak memory of a rank in an update of SmolLM2-135M's shape, {ROWS} x {TOKENS} tokens, {RANKS} ranks",
        other="parameters, gradients, optimizer state and activations counted by hand",
        goal=1.2,
        unit="GB",
        details={"state, GB": round(state / 1e9, 2), "activations, GB": round(kept / 1e9, 2)},
    )
    with tempfile.TemporaryDirectory() as directory:
        model_dir = _random_model.save("smollm2-135m", Path(directory), words=True, num_hidden_layers=options.layers)

        def ours() -> float:
            ranks = Processes(Ours, model_dir, config.vocab_size, 1, number=RANKS)
            peak = max(ranks.call("peak_memory", WORK, ROWS))
            ranks.close()
            return peak / 1e9

        in_turn(row, ours, lambda: (state + kept) / 1e9, options.rounds)
    finish([row], options.out)


def state_bytes(config: PreTrainedConfig) -> int:
    """Of a rank: parameters, gradients and optimizer state in fp32."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    attention = 2 * hidden * hidden + 2 * hidden * _key_size(config)
    per_layer = attention + 3 * hidden * inner + 2 * hidden
    return 16 * (layers * per_layer + config.vocab_size * hidden + hidden) // RANKS


def activation_bytes(config: PreTrainedConfig, num_tokens: int) -> int:
    """What a Llama keeps of its tokens for the backward pass, in fp32."""
    hidden, inner = config.hidden_size, config.intermediate_size
    norm = 3 * hidden  # its input, what it multiplies with its weight, and its output: the input of linear layers
    attention = 2 * hidden + 2 * _key_size(config)  # queries, output; keys, values
    mlp = 4 * inner  # gate, its SiLU, up, their product
    return 4 * num_tokens * (config.num_hidden_layers * (2 * norm + attention + mlp) + norm)


def _key_size(config: PreTrainedConfig) -> int:
    return config.hidden_size // config.num_attention_heads * config.num_key_value_heads


if __name__ == "__main__":
    main()
