"""What travels between driver and workers arrives as it was sent."""

from __future__ import annotations

import pickle
import time
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from ray import cloudpickle

from rlinf_lite.cluster.workers.wire import Columns, Groups
from rlinf_lite.types import (
    Column,
    GradingItem,
    Group,
    Normalizers,
    Problem,
    Prompt,
    RankBatch,
    Response,
    Round,
    Score,
    Segments,
    TokenBatch,
)


def sent(value: Any) -> Any:
    """As Ray sends it: buffers beside the pickle, in memory that must not be written."""
    buffers: list[pickle.PickleBuffer] = []
    data = cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[bytes(buffer.raw()) for buffer in buffers])


def assert_equal(one: Any, other: Any) -> None:
    """Also of types, and of arrays' and tensors' types."""
    assert type(one) is type(other)
    if isinstance(one, np.ndarray):
        assert one.dtype == other.dtype and np.array_equal(one, other)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    elif isinstance(one, dict):
        assert_equal([*one.items()], [*other.items()])
    elif hasattr(one, "__dataclass_fields__"):
        for field in fields(one):
            assert_equal(getattr(one, field.name), getattr(other, field.name))
    else:
        assert one == other


def response(index: int, length: int, **changes: Any) -> Response:
    given: dict[str, Any] = {
        "sample_index": index,
        "token_ids": np.arange(length),
        "loss_mask": np.arange(length) > 0,
        "logprobs": np.full(length, -0.1, dtype=np.float32),
        "finished": bool(index % 2),
        "text": f"text {index}",
        "weights_step": 3,
    }
    return Response(**{**given, **changes})


def groups(**changes: Any) -> list[Group]:
    problems = [
        Problem(
            problem_id=index, prompt=f"{index}=", answer="4", prompt_ids=(1, 2), source="a:1", metadata={"k": [index]}
        )
        for index in range(3)
    ]
    lengths = iter([3, 0, 5, 1, 2, 2])
    return [
        Group(
            prompt=Prompt(prompt_index=7 + index, epoch=0, problem=problem),
            responses=tuple(response(sample, next(lengths), **changes) for sample in range(index + 1)),
        )
        for index, problem in enumerate(problems)
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"logprobs": None},
        {"error": "out of memory", "text": ""},
        {"score": Score(reward=0.5, parts={"a": 0.25}, correct=True)},
    ],
)
def test_groups(changes):
    made = groups(**changes)
    assert_equal(sent(Groups(made)), made)


def test_responses_of_which_only_some_have_logprobs():
    made = groups()
    made[0] = Group(prompt=made[0].prompt, responses=(response(0, 3, logprobs=None), response(1, 2)))
    assert_equal(sent(Groups(made)), made)


def test_items_and_scores():
    items = [
        GradingItem(prompt="1+1=", response=str(index), answer="2", finished=True, metadata={"row": index})
        for index in range(3)
    ]
    assert_equal(sent(Columns(items)), items)
    scores = [Score(reward=1.0, correct=True), Score(reward=0.0, correct=False, error="no number", graded=False)]
    assert_equal(sent(Columns(scores)), scores)
    assert_equal(sent(Columns([])), [])
    assert_equal(sent(Groups([])), [])


def unit(index: int, columns: dict[Column, torch.Tensor]) -> TokenBatch:
    return TokenBatch(
        index=index,
        ids_N=torch.arange(5),
        positions_N=torch.tensor([0, 1, 2, 2, 3]),
        segments=Segments(
            start_S=torch.tensor([0, 2, 3]), stop_S=torch.tensor([2, 3, 5]), parent_S=torch.tensor([-1, 0, 0])
        ),
        source_M=torch.tensor([1, 1, 3]),
        targets_M=torch.tensor([2, 3, 4]),
        seq_M=torch.tensor([0, 1, 1]),
        num_responses=2,
        columns=columns,
    )


def test_a_rank_s_units():
    columns = {Column.ADVANTAGE: torch.tensor([0.5, -0.1, 2.0]), Column.OLD_LOGPROB: torch.full((3,), -0.3)}
    rounds = (Round(units=(unit(0, columns), None), num_slots=1), Round(units=(unit(1, {}), None), num_slots=1))
    batch = RankBatch(rounds=rounds, norm=Normalizers(num_tokens=3, num_sequences=2))
    arrived = sent(batch)
    assert_equal(arrived, batch)
    arrived.units[0].ids_N.add_(1)  # it is the rank's own memory


def test_a_unit_without_loss_tokens():
    empty = torch.empty(0, dtype=torch.int64)
    made = TokenBatch(
        index=0,
        ids_N=torch.arange(2),
        positions_N=torch.arange(2),
        segments=Segments(start_S=torch.tensor([0]), stop_S=torch.tensor([2]), parent_S=torch.tensor([-1])),
        source_M=empty,
        targets_M=empty,
        seq_M=empty,
        num_responses=1,
        columns={Column.ADVANTAGE: torch.empty(0)},
    )
    assert_equal(sent(made), made)


def test_columns_take_a_part_of_the_time_of_objects_one_by_one():
    """Of 512 responses: about a third, so that the way to the driver and back is no large part of a step."""
    problem = Problem(problem_id=0, prompt="1+1=", answer="2", prompt_ids=(1, 2), source="a:1")
    made = [
        Group(
            prompt=Prompt(prompt_index=index, epoch=0, problem=problem),
            responses=tuple(response(sample, 4) for sample in range(8)),
        )
        for index in range(64)
    ]

    def seconds(value: list[Group]) -> float:
        began = time.process_time()
        sent(value)
        return time.process_time() - began

    pairs = [(seconds(Groups(made)), seconds(made)) for _ in range(9)]
    assert min(mine for mine, _ in pairs) < 0.7 * min(theirs for _, theirs in pairs)
