"""Drafts save forward passes and change no bit, whether they come true or not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rlinf_lite.errors import NotFinite
from rlinf_lite.rollout.drafts import Drafts
from rlinf_lite.rollout.forward import Forward
from rlinf_lite.rollout.output import Sampled
from rlinf_lite.rollout.slots import Slots

END = 2
SIZES = {"vocab_size": 41, "intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 2}
PROMPT = [5, 6, 7, 8, 9]
PROMPTS = [[7, 12, 9, 7, 12], list(range(3, 38)), [5]]


def drafts_of(make_batch, sampled: list[list[int]], prompt: list[int] = PROMPT, most: int = 20, longest=999) -> Drafts:
    """Of a group with these responses so far."""
    out = Sampled.empty(len(sampled), most)
    for row, tokens in enumerate(sampled):
        out.tokens_NT[row, : len(tokens)] = tokens
        out.length_N[row] = len(tokens) if tokens[-1] == END else 0
    return Drafts(make_batch([prompt], group_size=len(sampled), max_new_tokens=most), out, {END}, longest)


def test_what_followed_the_last_tokens_is_guessed(make_batch):
    assert drafts_of(make_batch, [[6]]).choose([0], [1]) == [[7, 8, 9]]


def test_of_two_places_the_one_with_more_tokens_in_common_counts(make_batch):
    drafts = drafts_of(make_batch, [[30, 8, 31, 6, 7, 8]])
    assert drafts.choose([0], [6]) == [[9, 30, 8]]


def test_finished_responses_of_the_group_are_looked_up(make_batch):
    drafts = drafts_of(make_batch, [[20, 21, 22, 23, 24, 25, END], [20, 21]])
    assert drafts.choose([1], [2]) == [[22, 23, 24]]


def test_nothing_is_drafted_from_the_end_on(make_batch):
    drafts = drafts_of(make_batch, [[20, 21, END], [20]])
    assert drafts.choose([1], [1]) == [[21]]


@pytest.mark.parametrize(("length", "expected"), [(1, [7, 8]), (2, [8]), (3, [])])
def test_no_draft_is_longer_than_the_response_may_become(make_batch, length, expected):
    tokens = [6, 7, 8][:length]
    assert drafts_of(make_batch, [tokens], most=4).choose([0], [length]) == [expected]


def test_no_draft_is_beyond_the_positions_of_the_model(make_batch):
    """5 tokens of the prompt and 1 that is drawn."""
    assert drafts_of(make_batch, [[6]], longest=8).choose([0], [1]) == [[7, 8]]
    assert drafts_of(make_batch, [[6]], longest=6).choose([0], [1]) == [[]]


def test_what_groups_left_is_forgotten_when_it_is_too_much(make_batch, monkeypatch):
    monkeypatch.setattr("rlinf_lite.rollout.drafts._MOST_NOTES", 1)
    out = Sampled.empty(2, 20)
    out.tokens_NT[:, 0] = 6
    drafts = Drafts(make_batch([PROMPT, [6, 21, 22, 23]], group_size=1, max_new_tokens=20), out, {END}, 999)
    assert drafts.choose([0], [1]) == [[7, 8, 9]]
    assert drafts.choose([1], [1]) == [[21, 22, 23]]
    drafts.took(0, [7])
    assert drafts.choose([0], [1]) == [[7, 8, 9]]


def test_rows_with_one_sequence_get_none(make_batch):
    assert drafts_of(make_batch, [[6], [6]]).choose([None], [1]) == [[]]


def test_only_what_is_computed_anyway_is_given_away(make_batch):
    """Two rows are computed as four, and three as four; four as they are."""
    sampled = [[6], [6], [6], [6]]
    assert drafts_of(make_batch, sampled).choose([0, 1], [1, 1]) == [[7, 8], []]
    assert drafts_of(make_batch, sampled).choose([0, 1, 2], [1, 1, 1]) == [[7], [], []]
    assert drafts_of(make_batch, sampled).choose([0, 1, 2, 3], [1, 1, 1, 1]) == [[], [], [], []]


def test_what_comes_true_is_drafted_more_and_what_does_not_less(make_batch):
    """Of four rows the first draws what its guesses say, the others what nobody has drawn before."""
    text, fresh = list(range(10, 300)), iter(range(1000, 5000))
    drafts = drafts_of(make_batch, [text[:1]] * 4, prompt=text, most=400)
    length, number = 1, []
    while length < 250:
        chosen = drafts.choose([0, 1, 2, 3], [length] + [1] * 3)
        number.append(len(chosen[0]))
        drafts.took(0, text[length : length + 1 + len(chosen[0])])
        length += 1 + len(chosen[0])
        for row in (1, 2, 3):
            drafts.took(row, [next(fresh)])
    assert number[0] == 0 and number[-1] == 8 and number == sorted(number)
    for _ in range(60):
        drafts.took(0, [next(fresh)])
        chosen = drafts.choose([0, 1, 2, 3], [300, 1, 1, 1])
        number.append(len(chosen[0]))
    assert number[-1] == 0


class Spy:
    """Counts the tokens and the forward passes of a decoder."""

    def __init__(self, engine) -> None:
        self.passes = self.tokens = 0
        self._forward = engine._decoder._forward
        self._hidden, self._forward.hidden = self._forward.hidden, self._count

    def _count(self, ids_N, *others):
        self.passes, self.tokens = self.passes + 1, self.tokens + len(ids_N)
        return self._hidden(ids_N, *others)


def generated(engine, batch, max_drafted: int) -> tuple[list[tuple[list[int], bytes, bool]], Spy]:
    engine._decoder.max_drafted = max_drafted
    spy = Spy(engine)
    responses = [r for group in engine.generate(batch) for r in group.responses]
    del engine._decoder._forward.hidden  # the spy's
    return [(r.token_ids.tolist(), r.logprobs.tobytes(), r.finished) for r in responses], spy


SAMPLINGS = [{"do_sample": False}, {"temperature": 0.15}, {"temperature": 0.4}, {"temperature": 1.0, "top_p": 0.5}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2"])
def test_responses_are_the_same_bits(random_model, make_engine, make_batch, one_thread, family, dtype):
    """Rows join and leave; few of these models' responses end."""
    engine = make_engine(random_model(family).to(dtype), eos_ids={4}, return_logprobs=True, max_rows=9)
    passes, tokens = np.zeros((len(SAMPLINGS), 2), int), np.zeros((len(SAMPLINGS), 2), int)
    for index, options in enumerate(SAMPLINGS):
        batch = make_batch(PROMPTS, group_size=4 if options.get("temperature") else 1, max_new_tokens=28, **options)
        found = [generated(engine, batch, max_drafted) for max_drafted in (16, 0)]
        assert found[0][0] == found[1][0]
        passes[index], tokens[index] = [spy.passes for _, spy in found], [spy.tokens for _, spy in found]
    assert passes[:, 0].sum() < passes[:, 1].sum(), "some drafts are right"
    assert tokens[:, 0].sum() > tokens[:, 1].sum(), "and some are wrong"


def test_a_repetition_penalty_has_none(random_model, make_engine, make_batch):
    """What is drawn then depends on every token before."""
    engine = make_engine(random_model("llama"), return_logprobs=True)
    batch = make_batch(PROMPTS, group_size=2, max_new_tokens=12, do_sample=False, repetition_penalty=1.3)
    without, slow = generated(engine, batch, 0)
    found, fast = generated(engine, batch, 16)
    assert found == without and fast.tokens == slow.tokens


def test_numbers_of_a_wrong_draft_end_no_run(random_model, make_engine, make_batch, monkeypatch):
    """If its keys are not finite, the row's own token, which does not see them, is not either: 0 times NaN is NaN."""
    engine = make_engine(random_model("llama"), return_logprobs=True)
    batch = make_batch(PROMPTS[:1], max_new_tokens=12, do_sample=False)
    without, _ = generated(engine, batch, 0)
    forward, poisoned = engine._decoder._forward, []

    def hidden(ids_N, positions_N, layout):
        found = Forward.hidden(forward, ids_N, positions_N, layout)
        if isinstance(layout, Slots) and len(ids_N) > 1:
            poisoned.append(found.fill_(torch.nan))
        return found

    monkeypatch.setattr(forward, "hidden", hidden)
    engine._decoder.max_drafted = 16
    (group,) = engine.generate(batch)
    assert group.responses[0].token_ids.tolist() == without[0][0] and poisoned


def test_heads_whose_products_depend_on_the_rows_have_none(make_engine, make_batch):
    torch.manual_seed(3)
    sizes = {**SIZES, "hidden_size": 60, "num_attention_heads": 6, "head_dim": 10}
    engine = make_engine(AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).eval(), return_logprobs=True)
    batch = make_batch(PROMPTS, max_new_tokens=20, do_sample=False)
    without, slow = generated(engine, batch, 0)
    found, fast = generated(engine, batch, 16)
    assert found == without and fast.tokens == slow.tokens


def test_logits_that_are_not_finite_end_the_run(random_model, make_engine, make_batch):
    model = random_model("llama")
    model.lm_head.weight.data[0] = torch.nan
    with pytest.raises(NotFinite):
        make_engine(model).generate(make_batch(PROMPTS[:1], max_new_tokens=12))
