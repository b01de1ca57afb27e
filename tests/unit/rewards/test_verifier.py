"""The verifier process may hang, die, stop answering or lose its parent: at most one response is affected."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from rlinf_lite.rewards import VerifierStartError
from rlinf_lite.rewards import verifier as verifier_module
from rlinf_lite.rewards.math_grader import MathGrader
from rlinf_lite.rewards.verifier import Verifier, VerifierError, VerifierLost

HANG = "9^{9^{9^{9}}}"
COMPARE_TEXTS = """
while True:
    print(json.dumps({"correct": request["reference"] == request["answer"]}), flush=True)
    request = json.loads(input())
"""


@pytest.fixture(scope="module")
def verifier():
    """Shared, because starting its child takes a second. After any test it works, with the same child or a new one."""
    verifier = Verifier(1.0)
    yield verifier
    verifier.close()


@pytest.fixture
def other_child(tmp_path, monkeypatch):
    """``other_child(code)``: verifiers started from now on run this code when they get the first request."""

    def run(code):
        file = tmp_path / "child.py"
        ready = "import json, os, signal\nprint('{\"ready\": true}', flush=True)\nrequest = json.loads(input())\n"
        file.write_text(f"{ready}{code}\n")
        monkeypatch.setattr(verifier_module, "_CHILD", file)

    return run


@pytest.fixture
def compares_texts(other_child):
    """A verifier whose child starts at once, since it needs no math-verify."""
    other_child(COMPARE_TEXTS)
    verifier = Verifier(1.0)
    yield verifier
    verifier.close()


def wait_until_gone(pid, seconds=20.0):
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


def replace_latex_parser(directory, code):
    """Write a package that is found before the installed LaTeX parser, with this code."""
    package = directory / "latex2sympy2_extended"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "latex2sympy2.py").write_text(f"def ConversionConfig(**options): return options\n{code}")


def is_running(pid):
    """Whether the process runs. In a container an orphan may stay a zombie forever; a zombie does not run."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_in_a_thread_with_the_signal_blocked(verifier):
    """The child inherits the blocked signals of the thread that starts it; the time limit must still hold."""
    verifier.close()
    outcome = []

    def work():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})
        outcome.append(verifier.check("0.5", r"\frac{1}{2}"))
        try:
            verifier.check("5", HANG)
        except VerifierError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert outcome == [True, "math-verify took more than 1 s of CPU time"]


def test_a_hang_affects_one_response(verifier, items):
    grader = MathGrader(1.0)
    grader._verifier = verifier
    scores = grader.score(
        items(*((rf"\boxed{{{found}}}", "0.5") for found in (r"\sqrt{1/4}", HANG, r"\frac{\sqrt{4}}{4}")))
    )
    assert [score.correct for score in scores] == [True, False, True]
    assert [score.error for score in scores] == [None, "math-verify took more than 1 s of CPU time", None]
    assert scores[1].reward == 0.0 and scores[1].graded, "a response must not escape a penalty by its text"


def test_killed_between_two_checks(compares_texts):
    assert compares_texts.check("1", "1")
    first = compares_texts.pid
    os.kill(first, signal.SIGKILL)
    assert compares_texts.check("2", "2")
    assert compares_texts.pid not in (None, first)


def test_killed_during_a_check_the_check_is_repeated(verifier):
    """The first child is killed while it works: the verdict (out of CPU time) comes from the second."""
    verifier.check("1", "x")
    first = verifier.pid
    killer = threading.Timer(0.2, os.kill, (first, signal.SIGKILL))
    killer.start()
    with pytest.raises(VerifierError, match="CPU time"):
        verifier.check("5", HANG)
    killer.join()
    assert wait_until_gone(first)
    assert verifier.check("0.5", r"\frac{1}{2}")


def test_the_child_needs_neither_torch_nor_numpy(verifier):
    verifier.check("0.5", r"\frac{1}{2}")
    with open(f"/proc/{verifier.pid}/maps") as maps:
        loaded = maps.read()
    assert "torch" not in loaded and "numpy" not in loaded


def test_close_stops_the_child(verifier):
    verifier.check("0.5", r"\frac{1}{2}")
    child = verifier.pid
    verifier.close()
    verifier.close()
    assert wait_until_gone(child) and verifier.pid is None


def test_a_child_that_dies_twice_affects_one_check(other_child):
    verifier = Verifier(1.0)
    other_child("os.abort()")
    with pytest.raises(VerifierError, match="twice: exit status -6"):
        verifier.check("1", "1")
    other_child(COMPARE_TEXTS)
    assert verifier.check("1", "1")
    verifier.close()


@pytest.mark.parametrize("end", ["SIGKILL", pytest.param("SIGTERM", marks=pytest.mark.soak)])
def test_a_response_whose_check_is_killed_twice_is_not_graded(items, other_child, end):
    """The signal comes from outside (out of memory, an operator), so it says nothing about the response."""
    other_child(f"os.kill(os.getpid(), signal.{end})")
    with pytest.raises(VerifierLost, match="twice: exit status -"):
        Verifier(2.0).check("0.5", r"\frac12")
    (score,) = MathGrader(1.0).score(items((r"\boxed{x^2-1}", "(x-1)(x+1)")))
    assert not score.graded and "gave no answer twice" in str(score.error)


@pytest.mark.parametrize(
    "end",
    [
        "os.abort()",
        *(pytest.param(end, marks=pytest.mark.soak) for end in ("os.kill(os.getpid(), 11)", "raise SystemExit(1)")),
    ],
)
def test_a_response_that_crashes_the_check_twice_is_wrong(items, other_child, end):
    other_child(end)
    (score,) = MathGrader(1.0).score(items((r"\boxed{x^2-1}", "(x-1)(x+1)")))
    assert score.graded and not score.correct and "gave no answer twice" in str(score.error)


def test_a_stopped_child_is_replaced(other_child):
    other_child(COMPARE_TEXTS)
    verifier = Verifier(0.2)  # replaced after 2 s without an answer
    assert verifier.check("1", "1")
    first = verifier.pid
    os.kill(first, signal.SIGSTOP)
    assert not verifier.check("1", "2")
    assert verifier.pid != first and wait_until_gone(first)
    verifier.close()


def test_an_interrupt_leaves_no_stale_reply_behind(compares_texts, monkeypatch):
    assert compares_texts.check("1", "1")
    first, child = compares_texts.pid, compares_texts._child
    assert child is not None

    def interrupted(_wall_seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(child, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compares_texts.check("1", "1")
    assert not compares_texts.check("1", "2")
    assert compares_texts.pid != first


def test_a_verifier_that_cannot_start_is_an_error_not_a_wrong_answer(items, tmp_path, monkeypatch):
    fake = tmp_path / "child.py"
    fake.write_text('print(\'{"error": "ImportError: no antlr"}\')\n')
    monkeypatch.setattr(verifier_module, "_CHILD", fake)
    with pytest.raises(VerifierStartError, match="no antlr"):
        MathGrader(1.0).score(items((r"\boxed{\sqrt{4}}", "2")))
    fake.write_text("raise SystemExit(3)\n")
    with pytest.raises(VerifierStartError, match="exit status 3"):
        Verifier(2.0).check("0.5", r"\frac{1}{2}")


@pytest.mark.parametrize(
    "answer", [pytest.param("x", id="idle", marks=pytest.mark.soak), pytest.param(HANG, id="in a check")]
)
def test_the_child_dies_with_its_parent(answer):
    code = (
        "import sys, threading; from rlinf_lite.rewards.verifier import Verifier\n"
        "verifier = Verifier(1.0); verifier.check('1', 'x'); print(verifier.pid, flush=True)\n"
        "verifier.check('5', sys.argv[1]); threading.Event().wait()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, answer], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.2)  # so that it has begun the second check
    parent.kill()
    parent.communicate()
    assert wait_until_gone(child)


def test_output_of_libraries_reaches_neither_the_replies_nor_the_terminal(tmp_path, monkeypatch, capfd):
    """The LaTeX parser is replaced by a module that prints to both streams."""
    replace_latex_parser(
        tmp_path,
        "import os, sys, sympy\n"
        "def latex2sympy(text, **options):\n"
        "    print('noise'); os.write(1, b'noise'); os.write(2, b'noise')\n"
        "    print('noise', file=sys.stderr, flush=True)\n"
        "    return sympy.Rational(1, 2)\n",
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    verifier = Verifier(1.0)
    assert verifier.check("1", "x") and verifier.check("2", "y")
    verifier.close()
    assert capfd.readouterr() == ("", "")


def test_a_math_verify_that_parses_no_latex_is_an_error_at_start(tmp_path, monkeypatch):
    """With the wrong antlr runtime it can be imported, but grades everything as wrong."""
    replace_latex_parser(tmp_path, "def latex2sympy(text, **options): raise Exception('mismatched input')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(VerifierStartError, match="cannot read LaTeX"):
        Verifier(2.0).check("1", "x")
