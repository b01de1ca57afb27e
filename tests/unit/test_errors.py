"""User errors: their text, their way between processes, and what a program prints and returns for them."""

from __future__ import annotations

import ast
import builtins
import pickle
from pathlib import Path

import pytest

from rlinf_lite import errors
from rlinf_lite.checkpoint.errors import NoCheckpoint, RankSilent
from rlinf_lite.cluster.errors import Hung, NodeLost, RayLost, WorkerHung, WorkerLost
from rlinf_lite.errors import ConfigError
from rlinf_lite.numerics import NotDeterministic
from rlinf_lite.recovery.restarts import GaveUp
from rlinf_lite.runner.failures import explain
from rlinf_lite.runner.interruption import Interrupted

PACKAGE = Path(__file__).resolve().parents[2] / "rlinf_lite"


def test_key_value_and_remedy_make_the_line():
    error = ConfigError("must be positive", key="runner.max_steps", value=-2, remedy="use 1 or more")
    assert str(error) == "runner.max_steps=-2: must be positive; use 1 or more"
    assert (error.key, error.value, error.remedy) == ("runner.max_steps", -2, "use 1 or more")
    assert str(ConfigError("no such file", key="data.json")) == "data.json: no such file"
    assert str(ConfigError("unset", key="x", value=None)) == "x=None: unset"


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("bad", key="a.b", value=3, remedy="use 4"),
        NoCheckpoint("nothing in logs"),
        RankSilent("rank 1"),
        WorkerLost("ActorGroup", 1, "killed"),
        WorkerHung("ActorGroup", 1, 12.0),
        NodeLost(["n1", "n2"]),
        Hung(3.0, [("actor", 0)]),
        NotDeterministic("put_"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_travel_between_processes_with_their_attributes(error):
    error.add_note("in ActorGroup rank 1")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error) and vars(copy) == vars(error)


def test_a_missing_checkpoint_is_also_a_missing_file():
    assert isinstance(NoCheckpoint("nothing"), FileNotFoundError) and str(NoCheckpoint("nothing")) == "nothing"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("a=1: no\n  because\nb=2: no"), 2, "error: a=1: no\n  because\nerror: b=2: no"),
        (GaveUp("too often"), 3, f"error: too often\n{errors.NOTHING_LOST}"),
        (RayLost("no raylet"), 3, f"error: no raylet\n{errors.RESUME_ADVICE}"),
        (errors.NotFinite("loss is nan"), 2, f"error: loss is nan\n{errors.NotFinite.advice}"),
        (errors.OutOfMemory("CUDA out of memory"), 2, f"error: CUDA out of memory\n{errors.OutOfMemory.advice}"),
        (OSError(28, "No space left on device", "/data/x"), 2, "error: /data/x: No space left on device"),
        (KeyboardInterrupt(), 130, f"interrupted. {errors.RESUME_ADVICE}"),
        (
            Interrupted("SIGTERM", 75),
            75,
            f"interrupted by SIGTERM, before the first step. {errors.NOTHING_LOST} Start the same command again.",
        ),
        (RuntimeError("a bug"), 1, None),
        (FloatingPointError("division by zero"), 1, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_message_and_exit_code(error, code, message):
    assert explain(error) == (message, code)


INTERNAL = {
    "ForeignName": "never leaves the reader that catches it",
    "Interrupted": "a stop request, which no handler of errors may swallow",
    "Regrow": "no error: the loop is entered again with more ranks",
    "Unreadable": "one response has no value",
    "VerifierError": "one check failed: the response is graded without it",
    "VerifierLost": "one check has no verdict: the response cannot be graded",
    "_ChildLost": "never leaves the verifier that catches it",
}
"""Exceptions of the package that end no program."""


def descendants(bases: dict[str, list[str]], roots: set[str]) -> set[str]:
    """The classes that inherit one of ``roots``, however far up."""
    found: set[str] = set()
    while new := {name for name, parents in bases.items() if {*parents} & (roots | found)} - found:
        found |= new
    return found


def test_every_error_that_ends_a_program_is_a_user_error():
    bases: dict[str, list[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
    kinds = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)}
    exceptions = {name for name, kind in kinds.items() if issubclass(kind, BaseException)}
    found = descendants(bases, {*exceptions, "UnpicklingError"})
    assert found - descendants(bases, {"UserError"}) == {*INTERNAL, "UserError"}
