"""Problems of reasoning-gym tasks: the same in every process, split, and scored by the task that generated them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rlinf_lite.config import ConfigError, ReasoningGymConfig
from rlinf_lite.data.reasoning_gym import generated_by
from rlinf_lite.rewards.grader import SumGrader, WeightedGrader
from rlinf_lite.rewards.reasoning_gym import SUBJECT, ReasoningGymGrader, require_installed, stated_answers
from rlinf_lite.rewards.verifier import Verifier
from rlinf_lite.types import GradingItem

gym = pytest.importorskip("reasoning_gym")


@pytest.fixture(scope="module")
def child():
    """Shared by all tests, because it takes seconds to start."""
    child = Verifier(60.0, SUBJECT)
    yield child
    child.close()


@pytest.fixture(scope="module")
def grader(child):
    task = ReasoningGymGrader(60.0)
    task._verifier = child
    return SumGrader([WeightedGrader(name="task", weight=4.0, grader=task)], 0.5)


def config(task: str, **values) -> ReasoningGymConfig:
    return ReasoningGymConfig(**{"task": task, "size": 3, "val_size": 2, **values})


def item(question, response: str) -> GradingItem:
    return GradingItem(prompt="", response=response, answer="", finished=True, metadata=question.metadata)


def test_items_are_numbered_split_and_reproducible(child):
    settings = config("chain_sum", config={"min_terms": 2, "max_terms": 2})
    train, val = generated_by(child, settings, "train"), generated_by(child, settings, "val")
    assert [question.where for question in val] == ["reasoning_gym:chain_sum:0", "reasoning_gym:chain_sum:1"]
    assert [question.where for question in train] == [f"reasoning_gym:chain_sum:{number}" for number in (2, 3, 4)]
    assert len({question.content for question in train + val}) == 5
    assert generated_by(child, settings, "train") == train
    assert generated_by(child, config("chain_sum", seed=7, config=settings.config), "train") != train
    assert all(question.answer.lstrip("-").isdigit() for question in train)


def test_the_task_scores(child, grader):
    (question, *_) = generated_by(child, config("chain_sum"), "train")
    texts = [f"Well.\n{question.answer}", f"<answer>{question.answer}</answer>.", "no", "<answer>no</answer>", ""]
    scores = grader.score([item(question, text) for text in texts])
    assert [score.reward for score in scores] == [2.0, 2.0, 0.0, 0.0, 0.0]
    assert [score.correct for score in scores] == [True, True, False, False, False]
    assert [score.parts["task"] for score in scores] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert all(score.error is None for score in scores)


def test_a_task_whose_problems_have_no_single_answer(child, grader):
    """rush_hour stores a Python object in its entry, which must reach the task unchanged."""
    (question, *_) = generated_by(child, config("rush_hour"), "train")
    assert question.answer == "" and isinstance(question.metadata["entry"], str)
    (score,) = grader.score([item(question, "<answer>nonsense</answer>")])
    assert not score.correct and score.error is None


def test_an_answer_that_the_task_cannot_read_is_wrong(child, grader):
    (question, *_) = generated_by(child, config("prime_factorization"), "train")
    (score,) = grader.score([item(question, "garbage")])
    assert (score.reward, score.correct, score.error) == (0.0, False, None)


@pytest.mark.parametrize(
    ("response", "answers"),
    [
        ("So\n<answer> 4 </answer> or <answer>\n5\n6\n</answer>", ["5\n6"]),
        ("1 2\n3 4\n", ["1 2\n3 4", "3 4"]),
        ("five", ["five"]),
        ("<answer>cut", ["<answer>cut"]),
        ("", [""]),
    ],
)
def test_stated_answers(response, answers):
    assert stated_answers(response) == answers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            config("chain_sums"),
            "data.reasoning_gym.task=chain_sums: reasoning-gym has no such task; did you mean chain",
        ),
        (config("qqq"), "it has ab, acre, advanced_geometry"),
        (config("chain_sum", config={"terms": 2}), "data.reasoning_gym.config={'terms': 2}: chain_sum refuses it"),
        (config("chain_sum", config={"min_terms": 0}), "chain_sum refuses it (AssertionError"),
    ],
)
def test_invalid_settings_are_refused(child, settings, message):
    with pytest.raises(ConfigError) as caught:
        generated_by(child, settings, "train")
    assert message in str(caught.value)


def test_a_mixture_of_tasks(child, grader):
    parts = [{"name": "chain_sum"}, {"name": "gcd", "weight": 2}]
    questions = generated_by(child, config("composite", config={"datasets": parts}), "train")
    assert [score.correct for score in grader.score([item(q, q.answer) for q in questions])] == [True] * 3


def test_through_load_problems(load):
    loaded = load(type="reasoning_gym", reasoning_gym=config("chain_sum"), prompt_template="<{prompt}>")
    assert loaded.source == "reasoning_gym:chain_sum"
    assert [problem.source for problem in loaded.problems] == [f"reasoning_gym:chain_sum:{n}" for n in (2, 3, 4)]
    assert all(problem.prompt[0] + problem.prompt[-1] == "<>" for problem in loaded.problems)


def test_without_the_package(monkeypatch):
    monkeypatch.setattr("rlinf_lite.rewards.reasoning_gym.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="reasoning-gym is not installed; pip install"):
        require_installed()


@pytest.mark.soak
def test_the_problems_do_not_depend_on_the_hash_seed():
    """Without a fixed hash seed word_ladder generates other questions in every process."""
    code = (
        "from rlinf_lite.config import ReasoningGymConfig\n"
        "from rlinf_lite.data.reasoning_gym import generate_questions\n"
        "config = ReasoningGymConfig(task='word_ladder', size=3, val_size=0)\n"
        "print([question.content for question in generate_questions(config, 'train')])"
    )
    made = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(made) == 1


@pytest.mark.soak
def test_every_task_makes_items_and_scores_its_own_answers(child, grader):
    from reasoning_gym.factory import DATASETS

    for task in sorted(set(DATASETS) - {"composite"}):
        for question in generated_by(child, config(task), "train"):
            texts = [question.answer, "", "garbage", "<answer>\n</answer>"]
            scores = grader.score([item(question, text) for text in texts])
            assert all(score.error is None and 0.0 <= score.reward <= 2.0 for score in scores), (task, scores)
            assert scores[0].correct or not question.answer, question.where
