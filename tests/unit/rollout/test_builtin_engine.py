"""The builtin engine: greedy tokens equal those of transformers, sampling by counters, log-probs, weights."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from rlinf_lite.models.head import MIN_ROWS
from rlinf_lite.models.products import padded
from rlinf_lite.types import Group

RANDOM_PROMPTS = [[5, 9, 30], [7, 8, 9, 10, 11, 12, 13, 14, 15], [40], [3, 3, 3, 3, 20]]


def sums(embedded, *texts):
    return [embedded.tokenizer(text)["input_ids"] for text in texts]


class Row(NamedTuple):
    """A response with its prompt."""

    prompt_index: int
    sample_index: int
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    logprobs: np.ndarray | None
    finished: bool
    text: str


def flat(groups: list[Group]) -> list[Row]:
    """The responses of all groups, in order."""
    return [
        Row(
            group.prompt.prompt_index,
            response.sample_index,
            np.array(group.prompt.problem.prompt_ids),
            response.token_ids,
            response.logprobs,
            response.finished,
            response.text,
        )
        for group in groups
        for response in group.responses
    ]


def tokens(rollouts: list[Row]) -> list[tuple[int, int, list[int]]]:
    return [(r.prompt_index, r.sample_index, r.response_ids.tolist()) for r in rollouts]


def generated(model, prompts, eos_ids, **options) -> list[list[int]]:
    """What `model.generate` returns for each prompt alone (unpadded), truncated after the first end token."""
    responses = []
    for ids in prompts:
        ids = torch.tensor([ids])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            eos_token_id=sorted(eos_ids) or None,
            pad_token_id=0,
            **options,
        )
        responses.append(out[0, ids.shape[1] :].tolist())
    return responses


def test_greedy_tokens_equal_those_of_generate(embedded, make_engine, make_batch):
    prompts = sums(embedded, "57+38=", "1+2=", "99+99=", "12+3=", "4+80=", "10+10=")
    batch = make_batch(prompts, do_sample=False, max_new_tokens=8)
    rollouts = flat(make_engine().generate(batch))
    expected = generated(embedded.model, prompts, embedded.eos_ids, max_new_tokens=8)
    assert [r.response_ids.tolist() for r in rollouts] == expected
    assert len({len(response) for response in expected}) > 1, "rows should finish at different tokens"
    for rollout, ids in zip(rollouts, prompts, strict=True):
        assert rollout.prompt_ids.tolist() == list(ids) and rollout.prompt_ids.dtype == np.int64
        assert rollout.finished == (rollout.response_ids[-1] in embedded.eos_ids)
        assert rollout.text == embedded.tokenizer.decode(rollout.response_ids, skip_special_tokens=True)
        assert rollout.logprobs is None


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3", "gemma2"])
@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_tokens_of_other_architectures(random_model, make_engine, make_batch, model_type, penalty):
    """Longer than Gemma's sliding window; the end tokens are chosen so that rows finish at different times."""
    model = random_model(model_type)
    options = {"max_new_tokens": 14, "repetition_penalty": penalty}
    free = generated(model, RANDOM_PROMPTS, (), **options)
    eos_ids = {free[0][3], free[1][9]}
    expected = generated(model, RANDOM_PROMPTS, eos_ids, **options)
    rollouts = flat(
        make_engine(model, eos_ids=eos_ids).generate(make_batch(RANDOM_PROMPTS, do_sample=False, **options))
    )
    assert [r.response_ids.tolist() for r in rollouts] == expected
    assert len(expected[0]) <= 4


def test_a_batch_gives_the_same_tokens_whatever_was_generated_in_between(embedded, make_engine, make_batch):
    engine = make_engine(return_logprobs=True)
    batch = make_batch(sums(embedded, "57+38=", "1+2=", "99+99="), group_size=4, first=20)
    first = flat(engine.generate(batch))
    torch.manual_seed(99)
    flat(engine.generate(make_batch(sums(embedded, "5+8=", "31+2="), group_size=3, first=900, step=2)))
    torch.rand(3)
    again, elsewhere = flat(engine.generate(batch)), flat(make_engine(return_logprobs=True).generate(batch))
    for other in (again, elsewhere):
        assert tokens(other) == tokens(first)
        assert all(np.array_equal(a.logprobs, b.logprobs) for a, b in zip(first, other, strict=True))


def test_tokens_depend_on_seed_step_stream_prompt_and_sample(embedded, make_engine, make_batch):
    engine, prompts = make_engine(), sums(embedded, "57+38=", "99+11=")

    def responses(**changes):
        rollouts = flat(engine.generate(make_batch(prompts, **{"group_size": 6, "temperature": 3.0, **changes})))
        return [r.response_ids.tolist() for r in rollouts]

    plain = responses()
    assert responses() == plain
    for change in ({"seed": 6}, {"step": 2}, {"stream": "val"}, {"first": 7}):
        other = responses(**change)
        assert sum(a != b for a, b in zip(plain, other, strict=True)) >= 10, change
    assert len({tuple(response) for response in plain[:6]}) >= 5, "members of a group are different samples"


def test_a_sample_keeps_its_tokens_in_another_batch(embedded, make_engine, make_batch):
    """The RNG key is made of (prompt index, sample index), not of the row in the batch."""
    prompts = sums(embedded, "57+38=", "99+11=", "23+45=")
    engine = make_engine()
    together = {key[:2]: key[2] for key in tokens(flat(engine.generate(make_batch(prompts, group_size=4, first=50))))}
    alone = {key[:2]: key[2] for key in tokens(flat(engine.generate(make_batch(prompts[1:2], group_size=6, first=51))))}
    assert {key: alone[key] for key in alone if key in together} == {k: v for k, v in together.items() if k[0] == 51}


def test_rollouts_are_ordered_by_prompt_and_sample(embedded, make_engine, make_batch):
    rollouts = flat(make_engine().generate(make_batch(sums(embedded, "1+2=", "57+38="), group_size=3, first=4)))
    assert [(r.prompt_index, r.sample_index) for r in rollouts] == [(4, 0), (4, 1), (4, 2), (5, 0), (5, 1), (5, 2)]
    assert len({r.prompt_ids.tobytes() for r in rollouts[:3]}) == 1


def test_finished_rows_leave_the_batch(random_model, make_engine, make_batch):
    model = random_model("llama")
    sizes: list[int] = []
    engine = make_engine(model, eos_ids={4, 6, 8, 10, 12})
    engine.generate(make_batch(RANDOM_PROMPTS, max_new_tokens=1))  # a first one tries its layers
    engine._model.base_model.embed_tokens.register_forward_pre_hook(
        lambda module, args: sizes.append(args[0].shape[-1])
    )
    rollouts = flat(engine.generate(make_batch(RANDOM_PROMPTS, group_size=8, max_new_tokens=12)))
    lengths = [len(r.response_ids) for r in rollouts]
    sampled = [(r.prompt_index, r.response_ids.tolist()) for r in rollouts]
    # Sequences with more than t tokens; those of several rows are computed once.
    grown = [len({(prompt, *ids[:t]) for prompt, ids in sampled if len(ids) > t}) for t in range(1, 12)]
    assert grown[0] < sum(length > 1 for length in lengths) and grown[-1] > MIN_ROWS
    tokens_of_prompts = sum(len(prompt) for prompt in RANDOM_PROMPTS)  # each once for its group
    computed = [tokens_of_prompts, *(max(n, MIN_ROWS) for n in grown if n)]
    assert sizes == [padded(n) for n in computed]
    assert sizes[-1] < 32
    for r in rollouts:
        assert (r.response_ids[-1] in {4, 6, 8, 10, 12}) == r.finished
        assert not set(r.response_ids[:-1].tolist()) & {4, 6, 8, 10, 12}


def test_truncated_at_max_new_tokens(random_model, make_engine, make_batch):
    rollouts = flat(
        make_engine(random_model("llama"), eos_ids={999}).generate(make_batch(RANDOM_PROMPTS, max_new_tokens=3))
    )
    assert [len(r.response_ids) for r in rollouts] == [3] * 4
    assert not any(r.finished for r in rollouts)
    single = flat(
        make_engine(random_model("llama"), eos_ids=range(41)).generate(make_batch(RANDOM_PROMPTS, max_new_tokens=1))
    )
    assert all(r.finished and len(r.response_ids) == 1 for r in single)


@torch.no_grad()
def full_pass(model, rollout: Row, temperature: float) -> torch.Tensor:
    ids = torch.from_numpy(np.concatenate([rollout.prompt_ids, rollout.response_ids]))[None]
    logits = model(input_ids=ids, use_cache=False).logits
    logprobs = (logits[0, :-1].float() / temperature).log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None])[len(rollout.prompt_ids) - 1 :, 0]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize(
    ("options", "temperature"),
    [
        ({}, 1.0),
        ({"temperature": 0.6, "top_k": 5, "top_p": 0.8, "repetition_penalty": 1.2}, 0.6),  # before the filters
        ({"do_sample": False, "temperature": 0.6}, 1.0),  # greedy has no temperature
    ],
)
def test_logprobs_equal_those_of_a_full_pass(random_model, make_engine, make_batch, model_type, options, temperature):
    """1e-4: one token at a time over a cache rounds differently from a full pass (and padding shifts the sums)."""
    model = random_model(model_type)
    engine = make_engine(model, eos_ids={4, 6}, return_logprobs=True)
    for rollout in flat(engine.generate(make_batch(RANDOM_PROMPTS, group_size=3, max_new_tokens=12, **options))):
        assert rollout.logprobs is not None and rollout.logprobs.dtype == np.float32
        expected = full_pass(model, rollout, temperature)
        torch.testing.assert_close(torch.from_numpy(rollout.logprobs), expected, rtol=0, atol=1e-4)


def test_repetition_penalty_counts_prompt_and_response_but_not_padding(random_model, make_engine, make_batch):
    """With a huge penalty no token repeats; token 0 (the padding) may still be drawn."""
    prompts = [[5, 9, 30], list(range(1, 36))]
    engine = make_engine(random_model("llama"), eos_ids={999})
    rollouts = flat(engine.generate(make_batch(prompts, do_sample=False, repetition_penalty=1e6, max_new_tokens=5)))
    for rollout, prompt in zip(rollouts, prompts, strict=True):
        assert len({*prompt, *rollout.response_ids.tolist()}) == len(set(prompt)) + 5
    short = make_engine(random_model("llama"), eos_ids={999})
    alone = flat(short.generate(make_batch(prompts[:1], do_sample=False, repetition_penalty=1e6, max_new_tokens=5)))
    assert alone[0].response_ids.tolist() == rollouts[0].response_ids.tolist()


def test_weights_may_arrive_as_pieces(random_model, make_engine, make_batch):
    source, target = random_model("llama"), random_model("llama")
    with torch.no_grad():
        for param in target.parameters():
            param.zero_()
    engine = make_engine(target)
    pieces = []
    for name, param in source.named_parameters():
        middle = (len(param) + 1) // 2
        pieces += [(name, middle, param[middle:].detach().clone()), (name, 0, param[:middle].detach().clone())]
    engine.load_weights(iter(pieces))
    batch = make_batch(RANDOM_PROMPTS, group_size=2)
    assert tokens(flat(engine.generate(batch))) == tokens(flat(make_engine(source).generate(batch)))


def test_weights_are_converted_and_scalars_accepted(embedded, make_engine):
    engine = make_engine(embedded.model)
    engine._model.register_buffer("scalar", torch.zeros(()))
    engine = type(engine)(
        engine._model, embedded.tokenizer, eos_ids=embedded.eos_ids, return_logprobs=False, max_rows=8
    )
    rows = torch.full((2, 64), 1.5, dtype=torch.bfloat16)
    engine.load_weights([("model.embed_tokens.weight", 3, rows), ("scalar", 0, torch.tensor([2.0]))])
    assert (engine._model.lm_head.weight[3:5] == 1.5).all() and engine._model.lm_head.weight.dtype == torch.float32
    assert engine._model.scalar == 2.0


def test_an_unknown_weight_is_refused(make_engine):
    with pytest.raises(KeyError, match=r"model\.nose\.weight"):
        make_engine().load_weights([("model.nose.weight", 0, torch.zeros(1))])


def test_broken_weights_are_an_error(embedded, make_engine, make_batch):
    engine = make_engine()
    engine.load_weights([("model.norm.weight", 0, torch.full((64,), torch.nan))])
    with pytest.raises(FloatingPointError, match="logits"):
        flat(engine.generate(make_batch(sums(embedded, "1+2="))))
