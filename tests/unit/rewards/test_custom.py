"""Reward type ``custom``: the user's function is found, checked and called; its errors affect one response only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlinf_lite.config import ConfigError, RewardConfig
from rlinf_lite.rewards import RewardError, build_grader, fingerprint, refuse_too_many_ungraded
from rlinf_lite.rewards.outcome import ungraded
from rlinf_lite.rewards.user_function import OFFERED, find
from rlinf_lite.types import GradingItem, Score

ITEM = GradingItem(prompt="1+1=", response="2", answer="3", finished=True, metadata={"level": 5})


@pytest.fixture
def write(tmp_path):
    """Writes a file and returns ``path:name`` for a config."""

    def write(code: str, name: str = "score", file: str = "my_reward.py") -> str:
        (tmp_path / file).write_text(code)
        return f"{tmp_path / file}:{name}"

    return write


def scores(path: str, *items: GradingItem, **values) -> list[Score]:
    config = RewardConfig(reward_type="custom", path=path, **values)
    return build_grader(config).score(items or [ITEM])


def refusal(path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        fingerprint(RewardConfig(reward_type="custom", path=path))
    return str(caught.value)


def test_a_function_gets_the_arguments_that_it_names(write):
    path = write("def score(answer, response): return len(answer) + 10 * len(response)")
    (found,) = scores(path)
    assert found == Score(reward=11.0, correct=True)
    path = write(
        "seen = []\ndef score(**all): seen.append(all); return sorted(all) == ['answer', 'finished', "
        "'metadata', 'prompt', 'response'] and all['metadata'] == {'level': 5} and all['prompt'] == '1+1='"
    )
    assert scores(path) == [Score(reward=1.0, correct=True)]
    assert find("reward.path", path, ["."]).parameters == OFFERED
    assert scores(write("def score(response, *, weight=0.5, metadata=None): return weight * metadata['level']")) == [
        Score(reward=2.5, correct=True)
    ]
    assert scores(write("def score(): return 0.25"), reward_scale=4.0) == [Score(reward=1.0, correct=False)]


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("1", (1.0, True)),
        ("0.99", (0.99, False)),
        ("-1", (-1.0, False)),
        ("True", (1.0, True)),
        ("np.float32(0.5)", (0.5, False)),
        ("np.bool_(True)", (1.0, True)),
        ("Fraction(1, 2)", (0.5, False)),
        ("{'reward': 0.2, 'correct': True}", (0.2, True)),
        ("{'reward': 3, 'correct': 0}", (3.0, False)),
        ("{'reward': 3, 'format': 1}", (3.0, True)),
    ],
)
def test_return_values(write, returned, expected):
    path = write(f"import numpy as np\nfrom fractions import Fraction\ndef score(response): return {returned}")
    (found,) = scores(path)
    assert (found.reward, found.correct, found.error) == (*expected, None)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("return None", "reward.path: the function returned None; return a number, a bool, or {'reward'"),
        ("return '1'", "the function returned '1'"),
        ("return {'score': 1}", "the function returned {'score': 1}"),
        ("return float('nan')", "the function returned nan; a reward must be finite"),
        ("return {'reward': -1e999}", "the function returned -inf"),
        ("return [1.0]", "the function returned [1.0]"),
        ("return np.array([1.0, 2.0])", "TypeError: "),
        ("return np.complex64(1)", "the function returned "),
        ("return 10**400", "OverflowError: "),
        ("return {'reward': 0.5, 'correct': 'no'}", "the function returned {'reward': 0.5, 'correct': 'no'}; return"),
        ("raise type('Odd', (Exception,), {'__str__': lambda self: 1 / 0})", "Odd: (no text) ("),
        ("return {'reward': 1, 'correct': np.array([1, 0])}", "ValueError: "),
        ("return 1 / len(response.strip('2'))", "ZeroDivisionError: division by zero ("),
        ("raise SystemExit(3)", "SystemExit: 3 ("),
        ("return {'reward': None, 'correct': True}", "the function returned {'reward': None, 'correct': True}"),
        ("return {'reward': 1, 'correct': np.nan}", "the function returned {'reward': 1, 'correct': nan}; return"),
        ("raise TimeoutError('no answer in 10 s')", "TimeoutError: no answer in 10 s ("),
        ("import asyncio; raise asyncio.CancelledError", "CancelledError: "),  # not a subclass of Exception
        ("return score(response)", "RecursionError: "),
    ],
)
def test_an_error_leaves_one_response_ungraded(write, body, error):
    path = write(f"def score(response):\n    import numpy as np\n    if response == 'fine': return 1\n    {body}")
    fine = GradingItem(prompt="", response="fine", answer="", finished=True)
    first, second = scores(path, ITEM, fine)
    assert (first.reward, first.correct, first.graded) == (0.0, False, False)
    assert error in first.error
    assert second == Score(reward=1.0, correct=True)
    if "Zero" in error or "Exit" in error:
        assert first.error.endswith("my_reward.py:4)")


def test_a_class_is_instantiated_once(write):
    code = (
        "class Count:\n    def __init__(self): self.n = 0\n    def __call__(self, response): self.n += 1; return self.n"
    )
    assert [score.reward for score in scores(write(code, "Count"), ITEM, ITEM)] == [1.0, 2.0]
    assert scores(write(code + "\nmade = Count()", "made")) == [Score(reward=1.0, correct=True)]


def test_a_static_method_keeps_its_first_parameter(write):
    code = "class Grader:\n    @staticmethod\n    def __call__(response, answer): return response == answer"
    assert scores(write(code, "Grader"), ITEM) == scores(
        write("def score(response, answer): return response == answer"), ITEM
    )


@pytest.mark.parametrize("ends", ["raise SystemExit(1)", "1 / 0"])
def test_a_class_whose_init_fails_or_exits_is_refused(write, ends):
    path = write(f"class Grader:\n    def __init__(self): {ends}\n    def __call__(self): return 1", "Grader")
    with pytest.raises(ConfigError, match=r"Grader\(\) failed: "):
        scores(path)


def test_a_class_whose_init_fails_is_refused_with_the_location(write):
    path = write(
        "class Grader:\n    def __init__(self): open('/no/such/model')\n    def __call__(self): return 1", "Grader"
    )
    assert fingerprint(RewardConfig(reward_type="custom", path=path)) is not None
    with pytest.raises(ConfigError, match=r"Grader\(\) failed: FileNotFoundError: .*my_reward\.py:2\)"):
        scores(path)


def test_changes_to_metadata_do_not_reach_other_responses(write):
    path = write("def score(metadata): metadata['seen'] = 1; return len(metadata)")
    assert [score.reward for score in scores(path, ITEM, ITEM)] == [2.0, 2.0]
    nested = GradingItem(prompt="", response="", answer="", finished=True, metadata={"tests": [1]})
    path = write("def score(metadata): metadata['tests'].append(1); return len(metadata['tests'])")
    assert [score.reward for score in scores(path, nested, nested)] == [2.0, 2.0]


@pytest.mark.parametrize(
    ("code", "name", "expected"),
    [
        (
            "def score(completion): return 1",
            "score",
            "has a parameter 'completion'; it may have prompt, ",
        ),
        ("def score(response, /): return 1", "score", "has a parameter 'response'"),
        ("def scores(response): return 1", "score", "has no 'score'; did you mean scores?"),
        ("score = 5", "score", "is a int that cannot be called"),
        (
            "class Grader:\n    def __init__(self, model): pass",
            "Grader",
            "is a class that needs model; give these parameters defaults",
        ),
        ("class Grader: pass", "Grader", "cannot be called; name a function"),
        ("async def score(response): return 1", "score", "is async; name a plain function"),
        ("import no_such_thing", "score", "failed: ModuleNotFoundError: No module named 'no_such_thing' ("),
        ("def score(:", "score", "failed: SyntaxError"),
        ("1 / 0", "score", "my_reward.py failed: ZeroDivisionError: division by zero ("),
        ("import sys; sys.exit('bye')", "score", "failed: SystemExit: bye"),
        ("score = dict", "score", "its parameters cannot be determined; wrap it in a function of your own"),
    ],
)
def test_functions_that_cannot_be_called_are_refused_at_start(write, code, name, expected):
    path = write(code, name)
    message = refusal(path)
    assert message.startswith(f"reward.path={path}: ") and expected in message


@pytest.mark.parametrize("path", ["score", "my_pkg.my_reward", "my_reward.py", "my_reward.py:", ":score", "a:b c"])
def test_paths_that_name_no_function(path):
    assert "use my_pkg.my_reward:score, or path/to/my_reward.py:score" in refusal(path)


def test_missing_modules_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"there is no file {tmp_path}/none.py" in refusal("none.py:score")
    message = refusal("no_pkg_here.rewards:score")
    assert f"there is no module 'no_pkg_here'; looked in {tmp_path}" in message
    (tmp_path / "pkg_at_start").mkdir()
    (tmp_path / "pkg_at_start" / "__init__.py").write_text("")
    assert "there is no module 'pkg_at_start.rewards'" in refusal("pkg_at_start.rewards:score")


def test_modules_in_the_working_directory_are_found_and_shadow_nothing(tmp_path):
    """The launcher starts Python with -P, so that files in the working directory do not shadow other modules."""
    (tmp_path / "my_graders").mkdir()
    (tmp_path / "my_graders" / "__init__.py").write_text("")
    (tmp_path / "my_graders" / "rules.py").write_text("from .words import WORD\ndef score(response): return WORD")
    (tmp_path / "my_graders" / "words.py").write_text("WORD = 7")
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    (tmp_path / "math.py").write_text("def score(response): return 8")
    code = (
        "import sys; from rlinf_lite.config import RewardConfig; from rlinf_lite.rewards import build_grader\n"
        "from rlinf_lite.types import GradingItem; import json, math\n"
        "given = [GradingItem(prompt='', response='', answer='', finished=True)]\n"
        "for path in sys.argv[1:]:\n"
        "    grader = build_grader(RewardConfig(reward_type='custom', path=path))\n"
        "    print(grader.score(given)[0].reward, math.pi > 3)"
    )
    paths = ["my_graders.rules:score", "math.py:score"]
    done = subprocess.run([sys.executable, "-P", "-c", code, *paths], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout.split("\n")[:2], done.stderr) == (["7.0 True", "8.0 True"], "")


def test_a_worker_uses_the_search_path_of_the_driver(write, tmp_path, monkeypatch):
    """A worker on another node runs in another directory."""
    write("def score(response): return 9", file="elsewhere.py")
    config = RewardConfig(reward_type="custom", path="elsewhere.py:score")
    with pytest.raises(ConfigError, match="there is no file"):
        build_grader(config)
    assert build_grader(config, [str(tmp_path)]).score([ITEM])[0].reward == 9.0


def test_the_fingerprint_covers_source_and_name(write, tmp_path):
    code = "def score(response): return 1\ndef other(response): return 2\n"
    (tmp_path / "elsewhere").mkdir()

    def of(path: str) -> str | None:
        return fingerprint(RewardConfig(reward_type="custom", path=path))

    first = of(write(code))
    assert of(write(code)) == first
    assert of(write(code, file="elsewhere/renamed.py")) == first
    assert of(write(code, "other")) != first
    assert of(write(code + "# changed\n")) != first
    defined_elsewhere = "from helper_of_reward import score"
    write("def score(response): return 1", file="helper_of_reward.py")
    second = of(write(defined_elsewhere))
    sys.modules.pop("helper_of_reward")
    write("def score(response): return 22", file="helper_of_reward.py")
    assert of(write(defined_elsewhere)) != second
    assert fingerprint(RewardConfig()) is None


def test_the_example_in_the_docs(items):
    path = f"{Path(__file__).parents[3]}/docs/examples/my_reward.py:score"
    rows = [("95", "95"), ("57+38=95", "95"), ("95", "95", False), ("9 or 5", "95"), ("", "95")]
    found = build_grader(RewardConfig(reward_type="custom", path=path)).score(items(*rows))
    assert [(score.reward, score.correct) for score in found] == [
        (1.1, True),
        (1.0, True),
        (0.1, False),
        (0.0, False),
        (0.0, False),
    ]


def test_too_many_ungraded_responses_end_the_run():
    right, failed = Score(reward=1.0, correct=True), ungraded("KeyError: 'x' (a.py:3)")
    refuse_too_many_ungraded([], 0.0, "step 5")
    refuse_too_many_ungraded([right], 0.0, "step 5")
    refuse_too_many_ungraded([right, failed], 0.5, "step 5")
    refuse_too_many_ungraded([failed] * 29 + [right] * 71, 0.29, "step 5")  # 0.29 * 100 is below 29
    refuse_too_many_ungraded([failed] * 8, 1.0, "step 5")
    message = (
        r"reward: 3 of 4 responses of step 5 could not be graded, more than reward\.max_failed_fraction=0\.5; "
        r"the first error: KeyError: 'x' \(a\.py:3\)"
    )
    with pytest.raises(RewardError, match=message):
        refuse_too_many_ungraded([right, failed, ungraded("another"), ungraded("third")], 0.5, "step 5")
    with pytest.raises(RewardError, match="1 of 2"):
        refuse_too_many_ungraded([failed, right], 0.0, "step 5")


def test_a_wrong_answer_with_an_error_is_graded():
    given_up = Score(reward=0.0, correct=False, error="math-verify took more than 30 s of CPU time")
    refuse_too_many_ungraded([given_up] * 8, 0.0, "step 5")


def test_a_scaled_reward_must_be_finite(write):
    config = RewardConfig(reward_type="custom", path=write("def score(response): return 1e308"), reward_scale=10.0)
    (found,) = build_grader(config).score([ITEM])
    assert found.reward == 0.0 and "reward_scale included" in str(found.error)
