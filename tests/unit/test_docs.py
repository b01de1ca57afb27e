"""The documentation names what exists: links, anchors, files, tests, modules, config names and config keys."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from rlinf_lite.config.docs import listing

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "docker" / "README.md", *(ROOT / "docs").glob("*.md")])
TOP = r"(?:benchmarks|configs|docker|docs|rlinf_lite|tests|toolkits)"
SECTIONS = "cluster|runner|algorithm|rollout|data|actor|reward|critic"


@pytest.fixture(params=PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def page(request):
    return request.param


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}: {sorted(anchors(file))}"


def test_files_exist(page):
    for path, name in re.findall(rf"(?<![\w/.-])({TOP}/[\w./-]*\w)(?:::(\w+))?", page.read_text()):
        assert (ROOT / path).exists(), f"{page.name}: {path}"
        assert not name or re.search(rf"def {name}\b", (ROOT / path).read_text()), f"{page.name}: {path}::{name}"


def test_modules_exist(page):
    for module in set(re.findall(r"(?:python -m|from|import) (rlinf_lite[\w.]*)", page.read_text())):
        assert importlib.util.find_spec(module), f"{page.name}: {module}"


def test_configs_exist(page):
    named = re.findall(r"run_main_math\.sh ([a-z][\w.-]*)(?=\s)", page.read_text())
    named += re.findall(r"`((?:qwen|smollm|grpo-tiny)[\w.-]*-(?:gpu|\dgpu|fsdp|sums|gsm8k|vllm))`", page.read_text())
    for name in named:
        assert (ROOT / "configs" / f"{name}.yaml").is_file(), f"{page.name}: {name}"


def test_config_keys_exist(page):
    """Dotted keys such as ``runner.max_steps``, sections of the config, and keys within a value that is a dict.

    A key of an item of a list, such as ``reward.functions.1.weight``, is ``reward.functions[].weight``.
    """
    keys = {line.split()[0] for line in listing().splitlines()}
    sections = {key.rsplit(".", depth)[0] for key in keys for depth in range(1, key.count(".") + 1)}
    for key in re.findall(
        rf"(?<![\w.\-/])((?:{SECTIONS})\.[a-z][\w.]*\w)(?=[=:`\s,)]|$)", page.read_text(), re.MULTILINE
    ):
        key = re.sub(r"\.\d+\.", "[].", key)
        if key.rsplit(".", 1)[-1] not in ("py", "md", "yaml", "jsonl", "pt"):
            assert key in keys or key in sections or key.rsplit(".", 1)[0] in keys, f"{page.name}: {key}"
