"""Train `tiny-arithmetic`, the embedded default model: 0.1M parameters and a character tokenizer for two-digit sums.

It is first trained on correct sums, then on mostly wrong ones, so that GRPO starts at a sampled accuracy of 0.35 and
has something to learn. The same seed, machine and library versions give the same bytes. `tiny-arithmetic-2heads` has
two heads of size 32, because vLLM on a CPU has no kernels for head size 16.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlinf_lite import numerics

PAD, BOS, EOS, UNK = SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = "0123456789+-*/= "
MIN_OPERAND, MAX_OPERAND = 10, 99
MAX_NEW_TOKENS = 4
"""Three digits and the end of the sequence: the longest answer is 198."""

LEARN_STEPS, LEARN_BATCH, LEARN_LR, LEARN_ACCURACY = 3000, 256, 2.0e-3, 0.90
HIDE_STEPS, HIDE_BATCH, HIDE_LR, WRONG_FRACTION = 300, 256, 5.0e-5, 0.8
HIDE_ACCURACY, ACCURACY_TOLERANCE = 0.35, 0.02


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; encoding adds ``<bos>``, decoding joins the characters."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, num_heads: int = 4) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


class Sums:
    """Every sum of two two-digit operands as a row of tokens: prompt, answer, ``<eos>``, padding on the right."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        operands = torch.arange(MIN_OPERAND, MAX_OPERAND + 1)
        self.pairs_N2 = torch.cartesian_prod(operands, operands)
        self.prompts_NP = torch.tensor([tokenizer.encode(f"{a}+{b}=") for a, b in self.pairs_N2.tolist()])
        largest = 2 * MAX_OPERAND
        texts = [tokenizer.encode(str(answer), add_special_tokens=False) for answer in range(largest + 1)]
        ended = [[*ids, tokenizer.eos_token_id] for ids in texts]
        self.pad_id = tokenizer.pad_token_id
        self.answers_VA = torch.tensor([ids + [self.pad_id] * (MAX_NEW_TOKENS - len(ids)) for ids in ended])

    def __len__(self) -> int:
        return len(self.pairs_N2)

    def rows(self, indices_B: torch.Tensor, answers_B: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.prompts_NP[indices_B], self.answers_VA[answers_B]], dim=1)

    def right_answers(self, indices_B: torch.Tensor) -> torch.Tensor:
        return self.pairs_N2[indices_B].sum(dim=1)

    def some_wrong_answers(self, indices_B: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The correct answers, a fraction ``WRONG_FRACTION`` of them replaced by random sums."""
        smallest, largest = 2 * MIN_OPERAND, 2 * MAX_OPERAND
        drawn_B = torch.randint(smallest, largest + 1, indices_B.shape, generator=generator)
        wrong_B = torch.rand(indices_B.shape, generator=generator) < WRONG_FRACTION
        return torch.where(wrong_B, drawn_B, self.right_answers(indices_B))

    def answer_logprobs(self, model: LlamaForCausalLM, rows_BT: torch.Tensor) -> torch.Tensor:
        """Log-probs [B, MAX_NEW_TOKENS] of the answer tokens, 0 on padding."""
        logits_BAV = model(input_ids=rows_BT[:, :-1], use_cache=False).logits[:, -MAX_NEW_TOKENS:]
        targets_BA = rows_BT[:, -MAX_NEW_TOKENS:]
        logprobs_BA = F.log_softmax(logits_BAV, dim=-1).gather(-1, targets_BA[..., None])[..., 0]
        return logprobs_BA * (targets_BA != self.pad_id)

    @torch.no_grad()
    def sampled_accuracy(self, model: LlamaForCausalLM) -> float:
        """Expected fraction of correct answers at temperature 1, over all sums. Exact, as nothing is sampled: the
        mean probability of the correct answer."""
        total = 0.0
        for indices_B in torch.arange(len(self)).split(900):
            rows_BT = self.rows(indices_B, self.right_answers(indices_B))
            total += self.answer_logprobs(model, rows_BT).sum(dim=1).exp().sum().item()
        return total / len(self)


def train_until(
    reached: Callable[[float], bool],
    *,
    model: LlamaForCausalLM,
    sums: Sums,
    choose_answers: Callable[[torch.Tensor], torch.Tensor],
    generator: torch.Generator,
    max_steps: int,
    batch_size: int,
    lr: float,
    check_interval: int,
) -> float:
    """Train on random sums until `reached` accepts the sampled accuracy, which is returned.

    Raises:
        RuntimeError: `max_steps` were not enough.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(1, max_steps + 1):
        indices_B = torch.randint(len(sums), (batch_size,), generator=generator)
        rows_BT = sums.rows(indices_B, choose_answers(indices_B))
        logprobs_BA = sums.answer_logprobs(model, rows_BT)
        loss = -logprobs_BA.sum() / (rows_BT[:, -MAX_NEW_TOKENS:] != sums.pad_id).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % check_interval == 0:
            accuracy = sums.sampled_accuracy(model)
            print(f"  step {step:5d}  loss {loss.item():.4f}  sampled accuracy {accuracy:.4f}", flush=True)
            if reached(accuracy):
                return accuracy
    raise RuntimeError(f"the wanted accuracy was not reached in {max_steps} steps; try another --seed")


def make(out_dir: Path, seed: int, num_heads: int) -> None:
    """Write the model, its tokenizer and its configs to `out_dir`."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, num_heads)
    sums = Sums(tokenizer)
    print(f"learning the sums, up to a sampled accuracy of {LEARN_ACCURACY}")
    train_until(
        lambda accuracy: accuracy >= LEARN_ACCURACY,
        model=model,
        sums=sums,
        choose_answers=sums.right_answers,
        generator=generator,
        max_steps=LEARN_STEPS,
        batch_size=LEARN_BATCH,
        lr=LEARN_LR,
        check_interval=50,
    )
    print(f"hiding them, down to {HIDE_ACCURACY}")
    accuracy = train_until(
        lambda accuracy: accuracy <= HIDE_ACCURACY + ACCURACY_TOLERANCE / 2,
        model=model,
        sums=sums,
        choose_answers=lambda indices_B: sums.some_wrong_answers(indices_B, generator),
        generator=generator,
        max_steps=HIDE_STEPS,
        batch_size=HIDE_BATCH,
        lr=HIDE_LR,
        check_interval=1,
    )
    if abs(accuracy - HIDE_ACCURACY) > ACCURACY_TOLERANCE:
        raise RuntimeError(f"sampled accuracy {accuracy:.3f} overshot {HIDE_ACCURACY}; try another --seed")
    write(model, tokenizer, out_dir)
    print(f"{out_dir}: sampled accuracy {accuracy:.3f}")


def write(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out_dir: Path) -> None:
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    for path in out_dir.iterdir():
        path.chmod(0o644)  # safetensors writes 0600 whatever the umask


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="make_tiny_arithmetic", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out_dir", type=Path, help="directory to write; made if missing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heads", type=int, default=4, help="attention heads; 2 made tiny-arithmetic-2heads")
    parsed = parser.parse_args(arguments)
    numerics.fix("cpu")
    make(parsed.out_dir, parsed.seed, parsed.heads)


if __name__ == "__main__":
    main(sys.argv[1:])
