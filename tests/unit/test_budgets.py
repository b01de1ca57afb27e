"""Proportion: files up to 400 lines, functions up to 60, and no circle of imports in the package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
TREE = ("benchmarks", "docs/examples", "rlinf_lite", "tests", "toolkits")

# What is above its budget, with its size: it may shrink, not grow, and leaves the list once it is within the budget.
LONG_FILES = {
    "tests/unit/checkpoint/test_manager.py": 642,
    "tests/unit/rewards/test_graded_pairs.py": 495,  # a table
}
LONG_FUNCTIONS: dict[str, int] = {}
CIRCLES: list[list[str]] = []


@cache
def sources() -> dict[str, str]:
    """The text of every Python file, by its path from the top of the tree."""
    files = [file for directory in TREE for file in sorted((ROOT / directory).rglob("*.py"))]
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in files}


@cache
def long_files() -> dict[str, int]:
    sizes = {path: len(text.splitlines()) for path, text in sources().items()}
    return {path: size for path, size in sizes.items() if size > MAX_FILE_LINES}


@cache
def long_functions() -> dict[str, int]:
    """Lines from ``def`` to the last one, docstring included, by ``path::name``."""
    return {
        f"{path}::{node.name}": size
        for path, text in sources().items()
        if text.count("\n") > MAX_FUNCTION_LINES
        for node in functions(ast.parse(text))
        if (size := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    }


def functions(parent: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Those among the statements, at any depth. Expressions are not walked through, which would take seconds."""
    for field in ("body", "orelse", "handlers", "finalbody", "cases"):
        inside = getattr(parent, field, ())
        for node in inside if isinstance(inside, list) else ():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node
            yield from functions(node)


def imports() -> dict[str, set[str]]:
    """The modules that each module of the package imports, late imports and those for type checking included.

    A package counts as what its ``__init__`` imports, and a module does not count as importing the packages it lies in.
    """
    modules = {}
    for path, text in sources().items():
        if path.startswith("rlinf_lite/"):
            modules[path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")] = ast.parse(text)
    found: dict[str, set[str]] = {}
    for module, tree in modules.items():
        names = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                parent = node.module or ""
                within = {f"{parent}.{alias.name}" for alias in node.names} & modules.keys()
                names |= within
                if any(f"{parent}.{alias.name}" not in modules for alias in node.names):
                    names.add(parent)
        found[module] = {name for name in names & modules.keys() if name != module}
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module, sorted (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for neighbour in sorted(graph[node]):
            if neighbour not in index:
                visit(neighbour)
                low[node] = min(low[node], low[neighbour])
            elif neighbour in stack:
                low[node] = min(low[node], index[neighbour])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return sorted(found)


@pytest.mark.parametrize(
    ("found", "known"), [(long_files, LONG_FILES), (long_functions, LONG_FUNCTIONS)], ids=["files", "functions"]
)
def test_sizes(found, known):
    grown = {name: size for name, size in found().items() if size > known.get(name, 0)}
    assert not grown, f"too many lines, split them: {grown}"
    assert known.keys() == found().keys(), "within the budget now: remove it from the list"


def test_no_module_imports_itself_through_others():
    assert circles(imports()) == CIRCLES


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == [["a", "b", "c"]]
