"""``reward.functions``: the sum of weight times score, what each gave, and what happens if one fails."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
import yaml

from rlinf_lite.config import ConfigError, RewardConfig, RewardFunctionConfig, build, flatten, to_yaml
from rlinf_lite.config.rules import check
from rlinf_lite.rewards import build_grader, fingerprint
from rlinf_lite.types import GradingItem, Score

ROOT = Path(__file__).parents[3]
FUNCTIONS = """
def length(response): return len(response)
def half(response): return {'reward': 0.5, 'correct': True}
def even(response): return None if len(response) % 2 else 1
def fails(response): return {'fine': 0}[response]
def large(): return 1e308
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "several.py").write_text(FUNCTIONS)
    return lambda name: f"{tmp_path}/several.py:{name}"


def custom(name: str, path: str, weight: float = 1.0) -> RewardFunctionConfig:
    return RewardFunctionConfig(name=name, reward_type="custom", path=path, weight=weight)


def exact(weight: float = 1.0) -> RewardFunctionConfig:
    return RewardFunctionConfig(name="correct", reward_type="exact", weight=weight)


def scores(functions: list[RewardFunctionConfig], *responses: str, reward_scale: float = 1.0) -> list[Score]:
    items = [GradingItem(prompt="", response=response, answer="abc", finished=True) for response in responses]
    return build_grader(RewardConfig(functions=functions, reward_scale=reward_scale)).score(items)


def test_the_reward_is_the_scaled_sum_of_weight_times_score(path):
    found = scores([exact(2.0), custom("length", path("length"), -0.25)], "abc", "no", reward_scale=4.0)
    assert found == [
        Score(reward=5.0, correct=True, parts={"correct": 1.0, "length": 3.0}),  # 4 (2 - 0.75)
        Score(reward=-2.0, correct=False, parts={"correct": 0.0, "length": 2.0}),  # 4 (0 - 0.5)
    ]
    assert pickle.loads(pickle.dumps(found)) == found, "it travels between processes"


def test_the_sum_is_added_in_the_order_of_the_list(path):
    large = [custom("a", path("large"), 1.0), custom("b", path("large"), -1.0), exact()]
    assert [score.reward for score in scores(large, "abc")] == [1.0]
    assert [score.reward for score in scores([large[0], large[2], large[1]], "abc")] == [0.0]


def test_the_first_function_says_which_responses_are_correct(path):
    half = custom("half", path("half"))
    assert [score.correct for score in scores([half, exact()], "abc", "no")] == [True, True]
    assert [score.correct for score in scores([exact(), half], "abc", "no")] == [True, False]


def test_a_response_that_one_function_cannot_grade_is_ungraded(path):
    functions = [exact(), custom("even", path("even"), 0.5), custom("fails", path("fails"))]
    fine, odd, both = scores(functions, "fine", "hm", "abc")
    assert fine == Score(reward=0.5, correct=False, parts={"correct": 0.0, "even": 1.0, "fails": 0.0})
    for score in (odd, both):
        assert (score.reward, score.correct, score.graded, score.parts) == (0.0, False, False, {})
    assert odd.error.startswith("fails: KeyError: 'hm' (")
    none = "even: reward.functions.1.path: the function returned None; return a number, a bool, or "
    assert both.error.startswith(none) and "; fails: KeyError: 'abc' (" in both.error


def test_a_sum_must_be_finite(path):
    functions = [custom("a", path("large")), custom("b", path("large"))]
    (found,) = scores(functions, "abc")
    assert not found.graded
    assert found.error == "reward: inf; it must be finite, weights and reward.reward_scale included"


def test_one_that_is_wrong_by_its_own_fault_is_graded_with_its_name():
    """An answer that takes sympy longer than the limit counts as wrong, not as a failure of the grader."""
    math = RewardFunctionConfig(name="right", reward_type="math")
    grader = build_grader(RewardConfig(functions=[exact(), math], verifier_timeout=1.0))
    slow = GradingItem(prompt="", response=r"\boxed{(x+1)^{90000}(x-1)}", answer=r"(x-1)(x+1)^{90001}", finished=True)
    (found,) = grader.score([slow])
    grader.close()
    assert found.graded and found.parts == {"correct": 0.0, "right": 0.0}
    assert found.error.startswith("right: math-verify ")


def test_one_in_a_list_gives_what_it_gives_alone(path):
    items = [GradingItem(prompt="", response=text, answer="abc", finished=True) for text in ("abc", "no")]
    alone = build_grader(RewardConfig(reward_type="custom", path=path("length"), reward_scale=0.3)).score(items)
    listed = scores([custom("length", path("length"))], "abc", "no", reward_scale=0.3)
    assert [score.reward for score in alone] == [score.reward for score in listed] == [0.3 * 3.0, 0.3 * 2.0]
    assert [score.parts for score in alone] == [{}, {}], "without a name there is no metric of its own"


def test_the_sources_of_all_functions_are_part_of_the_identity(path, tmp_path):
    (tmp_path / "other.py").write_text("def score(): return 1\n")
    config = RewardConfig(
        functions=[exact(), custom("a", path("length")), custom("b", f"{tmp_path}/other.py:score", -1.0)]
    )
    before = fingerprint(config)
    assert before == fingerprint(config)
    (tmp_path / "other.py").write_text("def score(): return 2\n")
    assert fingerprint(config) != before
    assert fingerprint(RewardConfig(functions=[exact()])) is None


def test_all_functions_that_cannot_be_used_are_named(path):
    functions = [custom("a", path("none")), exact(), custom("b", "no_such_module:score")]
    with pytest.raises(ConfigError) as refusal:
        fingerprint(RewardConfig(functions=functions))
    first, second = str(refusal.value).splitlines()
    assert first.startswith(f"reward.functions.0.path={path('none')}: ") and "has no 'none'" in first
    assert second.startswith("reward.functions.2.path=no_such_module:score: there is no module")


START = {"runner": {"experiment_name": "x"}, "actor": {"model": {"model_path": "m"}}, "data": {"type": "arithmetic"}}
GYM = {"data": {"type": "reasoning_gym", "reasoning_gym": {"task": "gcd"}}}


def refused(functions: str, **sections: dict) -> list[str]:
    """Lines of the refusal; ``functions`` as in YAML."""
    given = {**START, **sections}
    given["reward"] = {"functions": yaml.safe_load(functions), **sections.get("reward", {})}
    try:
        check(build(given))
    except ConfigError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize(
    ("functions", "lines"),
    [
        ("[{name: a, wieght: 2}]", ["reward.functions.0.wieght: unknown key; did you mean weight?"]),
        ("[{name: a, weight: x}]", ["reward.functions.0.weight=x: takes a number"]),
        ("[{name: a}, {name: b, weight: 0}]", ["reward.functions.1.weight=0.0: would not count; use another weight"]),
        ("[{name: a, weight: .nan}]", ["reward.functions.0.weight=nan: must be a finite number"]),
        ("[{name: a, weight: -2e6}]", ["reward.functions.0.weight=-2000000.0: must be at least -1000000"]),
        ("[{name: a b}]", ["reward.functions.0.name=a b: its metric is reward/NAME; use a letter, then "]),
        ("[{reward_type: exact}]", ["reward.functions.0.name='': its metric is reward/NAME; "]),
        ("[{name: mean}]", ["reward.functions.0.name=mean: reward/mean is another metric; use another name"]),
        ("[{name: a}, {name: a}]", ["reward.functions.1.name=a: is the name of reward.functions.0 too; use another"]),
        ("[{name: a, reward_type: exct}]", ["reward.functions.0.reward_type=exct: not known here; use math or exact"]),
        ("[{name: a, path: 'm:f'}]", ["reward.functions.0.path=m:f: reward.functions.0.reward_type=math calls no"]),
        ("[{name: a, reward_type: custom}]", ["reward.functions.0.reward_type=custom: needs a function; set reward.f"]),
        ("[{name: a, reward_type: reasoning_gym}]", ["reward.functions.0.reward_type=reasoning_gym: does not know"]),
        ("brevity", ["reward.functions=brevity: takes a mapping such as {name: value}"]),
        ("null", ["reward.functions=null: takes a list; write reward.functions=[first,second], or "]),
        (
            "[{name: a, weight: 0, reward_type: exact, answer_format: boxed}, {name: a, weight: 1e9}]",
            [
                "reward.functions.0.weight=0.0: would not count; ",
                "reward.functions.1.weight=1000000000.0: must be at most 1000000",
                "reward.functions.0.answer_format=boxed: reward.functions.0.reward_type=exact looks for no final",
                "reward.functions.1.name=a: is the name of reward.functions.0 too; ",
            ],
        ),
    ],
)
def test_what_cannot_be_is_refused_all_at_once(functions, lines):
    found = refused(functions)
    assert len(found) == len(lines)
    for line, expected in zip(found, lines, strict=True):
        assert line.startswith(expected)


def test_the_keys_of_a_single_function_are_refused_beside_a_list():
    single = {"reward_type": "custom", "path": "m:f"}
    remedy = "and give it to an item of the list, or set reward.functions=[]"
    assert refused("[{name: a}]", reward=single) == [
        f"reward.reward_type=custom: has no effect with reward.functions; set it to math {remedy}",
        f"reward.path=m:f: has no effect with reward.functions; set it to null {remedy}",
    ]
    assert refused("[{name: a}]") == refused("[]") == []


def test_functions_fit_the_data():
    own = "{name: own, reward_type: custom, path: m:f}"
    assert refused(f"[{{name: task, reward_type: reasoning_gym}}, {own}]", **GYM) == []
    (line,) = refused("[{name: task, reward_type: reasoning_gym}, {name: b, reward_type: exact}]", **GYM)
    assert line.startswith("reward.functions.1.reward_type=exact: cannot grade data.type=reasoning_gym")


def test_maxrl_takes_no_penalty():
    functions = "[{name: a}, {name: b, reward_type: exact, weight: -0.5}]"
    (line,) = refused(functions, algorithm={"adv_type": "maxrl"})
    assert line.startswith("reward.functions.1.weight=-0.5: algorithm.adv_type=maxrl divides by a mean reward")
    assert refused(functions.replace("-", ""), algorithm={"adv_type": "maxrl"}) == refused(functions) == []


@pytest.mark.parametrize("metric", ["reward/brevity", "val/reward/brevity"])
def test_checkpoints_can_be_kept_by_the_score_of_one(metric):
    runner = {**START["runner"], "val_check_interval": 1, "checkpoint": {"keep_best": {"metric": metric}}}
    assert refused("[{name: brevity}]", runner=runner) == []
    (line,) = refused("[{name: brevty}]", runner=runner)
    assert line.endswith(f"no step has a metric of that name; did you mean {metric.replace('brevity', 'brevty')}?")
    runner["val_check_interval"] = -1
    assert len(refused("[{name: brevity}]", runner=runner)) == metric.startswith("val/")


def test_a_config_with_functions_is_written_and_identified():
    given = [{"name": "a", "weight": 2, "reward_type": "custom", "path": "${data.prompt_key}:f"}, {"name": "b"}]
    config = build({**START, "reward": {"functions": given}})
    assert config.reward.functions[0] == custom("a", "prompt:f", 2.0)
    assert build(yaml.safe_load(to_yaml(config))) == config
    identified = flatten(config, neutral_keys=False)["reward.functions"]
    assert (
        identified
        == json.loads(json.dumps(identified))
        == [
            {"name": "a", "reward_type": "custom", "answer_format": "auto", "weight": 2.0},
            {"name": "b", "reward_type": "math", "answer_format": "auto", "weight": 1.0},
        ]
    )


def test_the_example_in_the_docs():
    page = (ROOT / "docs" / "data-and-rewards.md").read_text()
    (section,) = re.findall(r"### Several functions with weights\n\n```yaml\n(.*?)```", page, re.DOTALL)
    config = build({**START, **yaml.safe_load(section)})
    check(config)
    grader = build_grader(config.reward, [str(ROOT)])
    texts = [r"\boxed{95}".ljust(100, "."), "95", "." * 300]
    found = grader.score([GradingItem(prompt="", response=text, answer="95", finished=True) for text in texts])
    grader.close()
    assert [score.parts for score in found] == [
        {"correct": 1.0, "brevity": 0.5},
        {"correct": 0.0, "brevity": 0.99},
        {"correct": 0.0, "brevity": 0.0},
    ]
    assert [score.reward for score in found] == pytest.approx([1.1, 0.198, 0.0], rel=1e-15)
    assert [score.correct for score in found] == [True, False, False]
