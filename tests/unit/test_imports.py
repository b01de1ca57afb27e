"""Who may import whom: the rooms of the design, kept by a test."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "rlinf_lite"

# Lowest first. A room imports only rooms of lower levels (and itself).
LEVELS = [
    {
        "columns",
        "config",
        "counters",
        "errors",
        "durable",
        "faults",
        "fingerprints",
        "node",
        "numerics",
        "paths",
        "ports",
        "ties",
        "printable",
        "readable",
        "rng",
        "stopwatch",
        "quick_imports",
        "types",
        "user_code",
    },
    {"algorithms", "rewards", "checkpoint", "observability"},
    {"weights"},
    {"data", "models"},
    {"training", "rollout"},
    {"eval", "export", "report", "selfcheck"},
    {"cluster"},
    {"runner", "recovery"},
    {"launch", "parent"},
    {"driver", "main_math"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
ONLY_IN = {"ray": {"cluster"}, "hydra": {"config"}, "wandb": {"observability"}}


@cache
def imports() -> list[tuple[Path, str, list[str]]]:
    """(file, its room, what it imports) for every import statement, late ones included."""
    found = []
    for file in PACKAGE.rglob("*.py"):
        module = ast.parse(file.read_text())
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        names: list[str] = []
        for node in ast.walk(module):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative import"
                names += [f"{node.module}.{alias.name}" for alias in node.names]
        found.append((file, room, names))
    return found


def test_rooms_import_only_lower_rooms():
    for file, room, names in imports():
        if room == "__init__":
            continue
        assert room in LEVEL, f"{file}: its room has no level yet"
        for name in names:
            parts = name.split(".")
            if parts[0] == "rlinf_lite" and parts[1] in LEVEL and parts[1] != room:
                same = {parts[1], room} <= LEVELS[0] or {parts[1], room} <= {"runner", "recovery"}
                lower = LEVEL[parts[1]] < LEVEL[room] or same
                assert lower, f"{file}: {room} must not import {parts[1]}"
                assert {parts[1], room} != {"training", "checkpoint"}, f"{file}: neither of these knows the other"


def test_libraries_stay_in_their_rooms():
    for file, room, names in imports():
        for name in names:
            allowed = ONLY_IN.get(name.split(".")[0])
            assert allowed is None or room in allowed, f"{file}: {name} belongs to {allowed}"


def test_a_fresh_process_stays_light():
    """One process imports them one after the other: what stays absent then is absent after each alone, too."""
    modules = {
        "rlinf_lite.main_math": ["torch", "ray", "hydra", "omegaconf", "pydantic", "numpy", "psutil", "yaml"],
        "rlinf_lite.numerics": ["torch", "ray", "transformers"],
        "rlinf_lite.rewards": ["torch", "ray", "math_verify"],
        "rlinf_lite.config": ["torch", "ray", "transformers"],
        "rlinf_lite.driver": ["torch", "ray"],
        "rlinf_lite.cluster.group": ["torch", "transformers"],
        "rlinf_lite.launch": ["torch", "transformers"],
    }
    assert (
        printed_by("\n".join(f"import {name}; found({name!r}, {not_in!r})" for name, not_in in modules.items())) == ""
    )


DRIVER_WITH_MODELS = """
import rlinf_lite.recovery.build, rlinf_lite.recovery.prepare, rlinf_lite.recovery.supervisor
from rlinf_lite.config.compose import load
from rlinf_lite.models.hf_directory import load_config, load_tokenizer, resolve
from rlinf_lite.recovery.logprobs import engine_is_exact
directory = resolve("embedded:tiny-arithmetic")
load_config(directory, None), load_tokenizer(directory), engine_is_exact(load([]), "cpu")
"""


def test_a_process_that_has_imported_torch_stays_light():
    """Each in a fork of such a process, since torch takes longer than the rest."""
    after = ["torch.distributed.checkpoint", "torch.distributed.tensor", "torch._dynamo", "sympy"]
    models = ["transformers.activations", "transformers.modeling_utils"]
    cases = [
        ("checkpoint", "import rlinf_lite.checkpoint", ["ray", "transformers", "hydra", "wandb"]),
        ("training", "import rlinf_lite.training.build", ["ray", "hydra", "rlinf_lite.checkpoint"]),
        ("a driver that has read its models", DRIVER_WITH_MODELS, [*after, *models]),
    ]
    forks = [
        f"if os.fork() == 0:\n exec({code!r})\n found({name!r}, {absent!r})\n end()\nassert os.wait()[1] == 0"
        for name, code, absent in cases
    ]
    assert printed_by("\n".join(["import torch", *forks])) == ""


FOUND = """
import gc, os, sys
gc.disable()
def found(importer, absent):
    for name in absent:
        if name in sys.modules:
            print(importer, "imports", name)
def end():
    sys.stdout.flush()
    os._exit(0)  # else Python takes module after module down
"""


def printed_by(code: str) -> str:
    """By a new process, in which ``found(importer, absent)`` prints those of the modules that are imported."""
    command = [sys.executable, "-c", f"{FOUND}{code}\nend()"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
