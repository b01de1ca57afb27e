"""Rows with the same sequence are computed once: each keeps the responses that it has alone."""

from __future__ import annotations

import numpy as np
import torch

from rlinf_lite.rollout.host_decoder import _place

ENDS = {4, 6}
PROMPTS = [[5, 9, 30], list(range(1, 36)), [7]]


class Moved:
    """Slots that hold the sequences' names."""

    def __init__(self, num: int) -> None:
        self.held = np.arange(num)

    def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        self.held[targets.numpy()] = self.held[sources.numpy()]


def test_sequences_find_what_they_continue():
    random = np.random.default_rng(0)
    for _ in range(500):
        most = int(random.integers(1, 12))
        children = random.integers(0, 4, size=most)
        children[random.integers(most)] += 1
        slots = random.permutation(most + int(random.integers(3)))[:most]  # of a node; not in order after an admission
        parents = slots.repeat(children)[:12]
        held = Moved(16)
        found = _place(parents, held)
        assert sorted(found.tolist()) == list(range(len(parents)))
        assert held.held[found].tolist() == parents.tolist()


def generated(engine, batch) -> list[tuple[list[int], list[float]]]:
    groups = engine.generate(batch)
    return [(r.token_ids.tolist(), r.logprobs.tolist()) for group in groups for r in group.responses]


def test_equal_rows_give_what_rows_alone_give(random_model, make_engine, make_batch):
    """With few likely tokens, filters and a penalty, and rows that join while others are decoded."""
    model = random_model("llama")
    options = {"temperature": 0.3, "top_p": 0.9, "repetition_penalty": 1.1, "max_new_tokens": 9}
    batch = make_batch(PROMPTS, group_size=16, **options)
    found = {
        rows: generated(make_engine(model, eos_ids=ENDS, return_logprobs=True, max_rows=rows), batch)
        for rows in (1, 5, 20, 48)
    }
    assert found[1] == found[5] == found[20] == found[48]
    distinct = {(index // 16, *ids) for index, (ids, _) in enumerate(found[1])}
    assert 6 < len(distinct) < 40, "some are equal, some are not"


def test_logits_of_rows_are_copied_in_parts(random_model, make_engine, make_batch, monkeypatch):
    engine = make_engine(random_model("llama"), eos_ids=ENDS, return_logprobs=True, max_rows=48)
    batch = make_batch(PROMPTS, group_size=16, temperature=0.3, max_new_tokens=9)
    whole = generated(engine, batch)
    monkeypatch.setattr("rlinf_lite.rollout.host_decoder._MAX_COPIED", 100)
    assert generated(engine, batch) == whole
