"""The tree uses the field's words: retired words and phrases, each with what to write instead."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TREE = (".ci", "benchmarks", "configs", "docker", "docs", "rlinf_lite", "tests", "toolkits")
SUFFIXES = {".cfg", ".cpu", ".css", ".j2", ".jinja", ".md", ".py", ".sbatch", ".sh", ".toml", ".txt", ".yaml", ""}
PROSE = ("README.md", "CHANGELOG.md", "docs", "configs", "benchmarks", "docker")
# The rooms that generate responses: torch and wandb have chunks elsewhere.
GENERATION = tuple(
    f"rlinf_lite/{room}" for room in ("rollout", "eval", "runner", "cluster", "recovery", "types")
) + tuple(f"tests/{room}" for room in ("unit/rollout", "unit/eval", "unit/runner", "vllm", "gpu"))
UNIT = (
    r"(?:token|step|row|rank|group|problem|response|page|worker|prompt|gpu|process|node|file|line|field|key|tensor|slot"
    r"|sample|subject|kind|leaf|layer|method|checkpoint|save|metric|section|round|batch|micro-batch|mini-batch|unit"
    r"|shard|run|call|operation|case|update|order)\b(?!'| (?:may|can|is|takes)\b)"
)
AMOUNT = (
    r"(?:\b(?:one|two|lines?|rows?|seconds?|bytes?|[kmg]i?b|tokens|losses|loss|responses|prompts|samples|steps|bits"
    r"|scalar|product|counter|curve|colour|bar|page|yaml|idea|process|driver|object|objects|state"
    r"|docstring|lines|numbers|threads|workers)`*|(?<!step )(?<![.\w])\d+(?:\.\d+)?(?:e-\d+)?)"
)


@dataclass(frozen=True)
class Retired:
    """A pattern, in lower case, that must not occur in any case; what to write instead."""

    pattern: str
    instead: str
    rooms: tuple[str, ...] = ()
    """Only in these rooms; everywhere if empty. For words that are right elsewhere."""


RETIRED = [
    Retired(r"(?<![a-z])mend(s|ed|ing|er|able)?(?![a-z])", "repair, replace, restart"),
    Retired(r"(?<![a-z])seats?(?![a-z])", "location (node, process id) of a worker; slot"),
    Retired(r"(?<![a-z])crews?(?![a-z])", "workers"),
    Retired(r"(?<![a-z])keepers?(?![a-z])", "replica holder"),
    Retired(r"(?<![a-z])wish(es|ed)?(?![a-z])", "stop request"),
    Retired(r"(?<![a-z])torsos?(?![a-z])", "incomplete checkpoint"),
    Retired(r"(?<![a-z])judg(e|es|ed|ing|e?ments?)(?![a-z])", "grader, grade, score"),
    Retired(r"(?<![a-z])folders?(?![a-z])", "directory"),
    Retired(r"(?<![a-z])roads?(?![a-z])", "transport (of weights)"),
    Retired(r"\b(go|goes|going|went|gone) on\b|(?<![a-z])go(es)?_on(?![a-z])", "resume, recover, continue"),
    Retired(
        r"(?<!number )\bgenerators\b",
        "RNG state ('generator' is an inference engine elsewhere)",
        ("rlinf_lite", "docs", "README.md", "tests", "CHANGELOG.md"),
    ),
    Retired(
        r"(?<![a-z])attempts?(?![a-z])",
        "response (a sampled completion), GradingItem",
        ("rlinf_lite/rewards", "rlinf_lite/eval", "tests/unit/rewards", "tests/unit/eval", "tests/unit/runner"),
    ),
    Retired(r"\bsampling noise|(?<![a-z])noise_keys?|streams? of noise", "sampling seed, RNG key"),
    Retired(
        r"(?<![a-z])noise(?![a-z])",
        "sampling seed, RNG key",
        ("rlinf_lite/rollout", "rlinf_lite/counters", "rlinf_lite/types", "tests/unit/rollout", "tests/vllm"),
    ),
    Retired(r"(?<![a-z])chunk", "generation batch", (*GENERATION, "docs", "README.md", "benchmarks")),
    Retired(
        r"\b(prompt|rollout|response|r|p)s?(\[\w+\])?\.position\b|\bprompt\(position=|\bprompt (positions?|id)\b",
        "prompt index (a position is a token's place in a sequence)",
    ),
    Retired(
        r"(?<![a-z])cut(s|ting)?(?![a-z])", "split, truncate, shard, interrupt", (*PROSE, "rlinf_lite", "toolkits")
    ),
    Retired(r"\bimport cut\b|\bcut\(|\bcut_problems\b", "split, truncate, shard, interrupt"),
    Retired(
        r"\b(rank|worker|node|process)'s share\b|\b(self\.|def )_?share\(|\bshares (of all|add up)|'s share of the",
        "shard; contribution to a sum",
    ),
    Retired(r"\bclass shell\b|`shell`|\(shell,|cluster[./]shell\b|\bempty shell\b|\ba shell (of|around)\b", "worker"),
    Retired(r"'s hand on\b|\bin hand\b|\bhands? (\w+ ){1,3}on\b", "per-rank saver; current, in progress; pass"),
    Retired(
        r"\b(writ(e|es|ten|ing)|cop(y|ies|ied)|goes|is|no) aside\b",
        "under a temporary name; rename",
    ),
    Retired(
        r"(?<!second )(?<!second_)(?<![a-z])moments(?![a-z])",
        "optimizer state; first and second moments",
        (*PROSE, "rlinf_lite", "tests/soak", "tests/conftest"),
    ),
    Retired(
        r"\bparameters, moments\b|\b(weights|parameters) and moments\b", "optimizer state; first and second moments"
    ),
    Retired(
        r"\b_?say(_\w+)?\(|\bimport _?say_|\b_said\b|\b(is|are|was) said (once|aloud|in|while|with)\b",
        "log, print, warn",
    ),
    Retired(r"\baloud\b", "log it; with a log line"),
    Retired(r"\b(same|equal|other) bits\b|\bto the bit\b", "bitwise identical, bit for bit, bit-exact; other results"),
    Retired(rf"{AMOUNT} an? {UNIT}", "per: 'one row per problem', 'loss per token'"),
    Retired(r"\bold work\b", "stale rollouts, off-policy by k steps"),
    Retired(r"\blast words\b", "last lines of output"),
    Retired(r"(?<![a-z])slips?(?![a-z])", "mistake"),
    Retired(r"\ba wall of\b", "many lines of"),
    Retired(r"\bwhoever\b", "the first one that; any"),
    Retired(r"\bof the machine's\b|\bof whose\b|\bof whom\b", "a sentence without the inverted clause"),
]

# Other people's names, and names that users' files and scripts hold. Taken out of a line before it is searched.
ALLOWED = [
    (r"length/cut_fraction|\bcut_fraction\b", "a metric's and a JSON key's public name"),
    (r"\bMOMENTS\b", "the two tensors exp_avg and exp_avg_sq"),
    (r"\bpower cut\b", "the standard term"),
    (r"enable_chunked_prefill|chunked prefill", "vLLM's"),
    (r"\bChunkStorageMetadata\b|\.chunks\b", "torch's"),
]

# Rooms whose words are being replaced. A room that is clean must not be listed.
PENDING: set[str] = set()


def room_of(file: Path) -> str:
    """``rlinf_lite/rollout`` of ``rlinf_lite/rollout/engine.py``, ``tests/unit/rollout``, ``docs``, ``README.md``."""
    parts = file.relative_to(ROOT).parts
    depth = {"rlinf_lite": 2, "toolkits": 2, "tests": 3 if parts[1:2] == ("unit",) else 2}.get(parts[0], 1)
    if parts[0] == "tests" and len(parts) <= depth:
        depth = len(parts) - 1
    return "/".join(parts[:depth]).removesuffix(".py")


@cache
def files_by_room() -> dict[str, list[Path]]:
    files = [file for file in ROOT.iterdir() if file.is_file() and not file.name.startswith(".")]
    for directory in TREE:
        files += [file for file in (ROOT / directory).rglob("*") if file.is_file()]
    rooms: dict[str, list[Path]] = {}
    for file in sorted(files):
        if file.suffix in SUFFIXES and file.name not in ("LICENSE", Path(__file__).name):
            rooms.setdefault(room_of(file), []).append(file)
    return rooms


def retired_in(text: str, room: str) -> list[tuple[int, str, str]]:
    """(line number, what is written, what to write instead), in order. A phrase is found across a line's end too."""
    lines = [re.sub(r"^\s*#?\s*|\s*$", "", line) for line in text.split("\n")]
    starts = list(accumulate((len(line) + 1 for line in lines), initial=0))
    joined = " ".join(lines)
    for phrase, _ in ALLOWED:
        joined = re.sub(phrase, lambda match: "_" * len(match.group()), joined)
    joined = joined.lower()
    return sorted(
        (bisect_right(starts, match.start()), match.group(), word.instead)
        for word in RETIRED
        if not word.rooms or room.startswith(word.rooms)
        for match in re.finditer(word.pattern, joined)
    )


def findings(room: str) -> list[str]:
    """In file names (as line 0) and in what the files hold."""
    return [
        f"{path}:{number}: {written!r}: write {instead}"
        for file in files_by_room()[room]
        for path in [file.relative_to(ROOT).as_posix()]
        for number, written, instead in [
            *((0, written, instead) for _, written, instead in retired_in(f" {file.stem} ", room)),
            *retired_in(file.read_text(), room),
        ]
    ]


@pytest.mark.parametrize("room", sorted(files_by_room()))
def test_no_retired_words(room):
    found = findings(room)
    if room in PENDING:
        assert found, f"{room} is clean: remove it from PENDING"
    else:
        assert not found, "\n".join([f"{len(found)} retired words in {room}:", *found])


def test_pending_rooms_exist():
    assert set(files_by_room()) >= PENDING


@pytest.mark.parametrize(
    ("line", "room"),
    [
        ("a loss a token", "docs"),
        ("one row a problem, 16 a rank", "docs"),
        ("the run goes on by itself", "README.md"),
        ("def _say_data(train):", "rlinf_lite/recovery"),
        ("keys = noise_keys(chunk)", "rlinf_lite/rollout"),
        ("order by rollout.position", "rlinf_lite/runner"),
        ("resumes to the same bits", "docs"),
        ("self._wishes.append(wish)", "rlinf_lite/runner"),
        ("parameters and moments", "docs"),
        ("this rank's share of the rows", "rlinf_lite/training"),
    ],
)
def test_a_retired_word_is_found(line, room):
    assert retired_in(line, room)


@pytest.mark.parametrize(
    ("line", "room"),
    [
        ("three times in a row, half a step later, once a second", "docs"),
        ("after step 3 a worker dies", "docs"),
        ("the manifest says which step it holds", "docs"),
        ("first and second moments", "docs"),
        ("Fast splittable pseudorandom number generators", "rlinf_lite/counters"),
        ("chunks of a DCP tensor", "rlinf_lite/checkpoint"),
        ('"length/cut_fraction",', "rlinf_lite/metric_names"),
        ("set aside as damaged", "rlinf_lite/checkpoint"),
        ("components share a slot", "rlinf_lite/cluster"),
        ("recommended, amendment, shortcut", "docs"),
    ],
)
def test_the_right_words_stay(line, room):
    assert not retired_in(line, room)
