"""Requests that vLLM aborts: the response records the error, the others are kept. A hand-written fake replaces vLLM."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rlinf_lite.rollout.vllm_engine import VllmEngine
from rlinf_lite.types import GenerationBatch, Problem, Prompt, Sampling

EOS = 2


def output(token_ids, finish_reason="stop", logprob=-0.5):
    logprobs = [{token: SimpleNamespace(logprob=logprob)} for token in token_ids]
    return SimpleNamespace(token_ids=token_ids, finish_reason=finish_reason, logprobs=logprobs)


class Vllm:
    def __init__(self, outputs) -> None:
        self.outputs = outputs

    def reset_prefix_cache(self) -> bool:
        return True

    def generate(self, prompts, _params, use_tqdm):
        return [SimpleNamespace(outputs=[given]) for _, given in zip(prompts, self.outputs, strict=True)]


class Tokenizer:
    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row)) for row in rows]


@pytest.fixture
def generate():
    """The responses of an engine for given outputs of one group."""

    def run(*outputs):
        engine = VllmEngine.__new__(VllmEngine)
        engine._llm, engine._tokenizer, engine._new_params = Vllm(outputs), Tokenizer(), dict
        engine._eos, engine._return_logprobs = [EOS], True
        problem = Problem(problem_id=0, prompt="?", answer="", prompt_ids=(1, 5), source="")
        sampling = Sampling(
            do_sample=True, temperature=1.0, top_k=-1, top_p=1.0, repetition_penalty=1.0, max_new_tokens=4
        )
        (group,) = engine.generate(
            GenerationBatch(
                stream="train",
                step=1,
                index=0,
                prompts=(Prompt(prompt_index=7, epoch=0, problem=problem),),
                group_size=len(outputs),
                sampling=sampling,
                seed=1,
            )
        )
        assert group.prompt.prompt_index == 7
        return group.responses

    return run


def test_regular_ends(generate):
    stopped, cut, at_once = generate(output([4, EOS]), output([4, 5, 6, 7], "length"), output([EOS]))
    assert (stopped.error, cut.error, at_once.error) == (None, None, None)
    assert (stopped.finished, cut.finished, at_once.finished) == (True, False, True)
    assert stopped.logprobs.tolist() == [-0.5, -0.5]


@pytest.mark.parametrize(
    ("failed", "error", "num_tokens"),
    [
        (output([], "abort"), "vLLM ended the request early: finish_reason 'abort'", 0),
        (output([4, 5], "abort"), "vLLM ended the request early: finish_reason 'abort'", 2),
        (SimpleNamespace(token_ids=[4], finish_reason="error", logprobs=None), "finish_reason 'error'", 1),
        (SimpleNamespace(token_ids=[], finish_reason=None, logprobs=None), "finish_reason None", 0),
        (output([], "stop"), "vLLM returned no token", 0),
        (output([4, EOS], logprob=float("nan")), "logits are not finite", 2),
    ],
)
def test_a_request_that_fails_costs_one_response(generate, failed, error, num_tokens):
    first, second = generate(failed, output([4, EOS]))
    assert error in first.error and not first.finished
    assert (first.sample_index, len(first.token_ids)) == (0, num_tokens)
    assert second.error is None and second.token_ids.tolist() == [4, EOS]


def test_non_finite_logprobs_in_every_response_mean_broken_weights(generate):
    broken = output([4, EOS], logprob=float("nan"))
    with pytest.raises(FloatingPointError, match=r"rollout\.model\.precision"):
        generate(broken, broken)
