"""The public config keys are recorded, and their page is current."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rlinf_lite.config import docs, keys
from rlinf_lite.config.__main__ import LISTING, PAGE, main

WRITE = "run `python -m rlinf_lite.config --write`"


def test_the_public_keys_are_as_recorded():
    recorded, now = LISTING.read_text().splitlines(), docs.listing().splitlines()
    changed = [f"- {line}" for line in recorded if line not in now] + [
        f"+ {line}" for line in now if line not in recorded
    ]
    assert not changed, (
        "the config keys of users changed. If that is intended, add a line to CHANGELOG.md for each, say there what an "
        f"older checkpoint needs if the key is not neutral, and {WRITE}:\n" + "\n".join(changed)
    )
    assert recorded == now, f"the order of the keys changed; {WRITE}"


def test_the_page_of_keys_is_current():
    assert PAGE.read_text() == docs.markdown(), f"docs/config.md is out of date; {WRITE}"


@pytest.mark.parametrize("name", keys())
def test_each_key_has_a_meaning(name):
    assert keys()[name].description


def test_the_command_prints_a_key_a_section_and_the_nearest_key(capsys):
    assert main(["runner.max_steps"]) == 0
    assert capsys.readouterr().out.startswith("runner.max_steps=-1  (whole number, positive, or -1 for none, neutral)")
    assert main(["actor.optim"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 * sum(name.startswith("actor.optim.") for name in keys())
    assert main(["runner.max_stepz"]) == 2
    assert "did you mean runner.max_steps?" in capsys.readouterr().err


def test_the_command_imports_nothing_heavy():
    code = "import sys, rlinf_lite.config.__main__; print([n for n in ('torch', 'ray', 'hydra') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
