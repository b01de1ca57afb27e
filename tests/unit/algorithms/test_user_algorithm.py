"""An algorithm of the user: the documented example step by step, and what is refused by path and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlinf_lite.algorithms.algorithm import Graded, LossInputs
from rlinf_lite.algorithms.build import build
from rlinf_lite.algorithms.user_algorithm import fingerprint
from rlinf_lite.config import AlgorithmConfig, ConfigError
from rlinf_lite.types import Column, Normalizers

EXAMPLE = f"{Path(__file__).parents[3]}/docs/examples/my_algorithm.py:Reinforce"


def test_the_documented_example_step_by_step():
    algorithm = build(AlgorithmConfig(path=EXAMPLE))
    graded = Graded(
        rewards_PG=torch.tensor([[1.0, 0.0], [1.0, 9.0]], dtype=torch.float64),
        counted_PG=torch.tensor([[True, True], [True, False]]),
        finished_PG=torch.ones(2, 2).bool(),
        num_tokens_PG=torch.tensor([[2, 1], [1, 0]]),
        max_tokens=4,
        columns={},
    )
    assert algorithm.admit(graded).tolist() == [True, True] and algorithm.needs == frozenset()
    credit = algorithm.credit(graded)
    # The mean of the three grades is 2/3.
    torch.testing.assert_close(credit.columns[Column.ADVANTAGE], torch.tensor([1 / 3, 1 / 3, -2 / 3, 1 / 3]))
    assert credit.trained_PG.tolist() == [[True, True], [True, False]]
    logprob = torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True)
    outputs = algorithm.losses().policy(
        LossInputs(
            logprob_M=logprob,
            columns={**credit.columns, Column.OLD_LOGPROB: logprob.detach()},
            seq_M=torch.tensor([0, 0, 1, 2]),
            num_responses=3,
            norm=Normalizers(num_tokens=4, num_sequences=3),
        )
    )
    outputs.loss.backward()
    assert outputs.loss.item() == pytest.approx((1 + 2 - 6 + 4) / 3 / 4)
    torch.testing.assert_close(logprob.grad, -credit.columns[Column.ADVANTAGE] / 4)


WHOLE = """
from rlinf_lite.types import Column
class Mine:
    needs = frozenset({Column.OLD_VALUE})
    def __init__(self, config): self.config = config
    def admit(self, graded): ...
    def credit(self, graded): ...
    def losses(self): ...
"""


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (WHOLE.replace("Mine", "Yours"), "has no 'Mine'"),
        (WHOLE + "Mine = 3", "is a int that cannot be called; name a class"),
        (WHOLE.replace("credit", "kredit"), "has no method credit; an algorithm has admit, credit, losses"),
        (WHOLE.replace("needs = frozenset({Column.OLD_VALUE})", "needs = ['old_value']"), "set it to a frozenset of"),
        (WHOLE.replace("self.config = config", "1 / 0"), "Mine(config.algorithm) failed: ZeroDivisionError"),
        ("import no_such_module_here", "importing my_algo.py failed: ModuleNotFoundError"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path, monkeypatch, source, said):
    monkeypatch.chdir(tmp_path)
    Path("my_algo.py").write_text(source)
    with pytest.raises(ConfigError) as refusal:
        build(AlgorithmConfig(path="my_algo.py:Mine"))
    message = str(refusal.value)
    assert message.startswith("algorithm.path=my_algo.py:Mine: ") and said in message


def test_a_path_without_a_class_is_refused_with_its_form():
    form = r"names no class; use my_pkg\.my_algo:MyAlgorithm, or path/to/my_algo\.py:MyAlgorithm"
    with pytest.raises(ConfigError, match=form):
        build(AlgorithmConfig(path="my_algo"))


def test_its_source_is_identified(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = AlgorithmConfig(path="my_algo.py:Mine")
    Path("my_algo.py").write_text(WHOLE)
    assert build(config).needs == {Column.OLD_VALUE} and build(config).config is config
    first = fingerprint(config)
    assert first == fingerprint(config) and first.startswith("Mine ")
    Path("my_algo.py").write_text(WHOLE + "# changed")
    assert fingerprint(config) != first
    assert fingerprint(AlgorithmConfig()) is None
