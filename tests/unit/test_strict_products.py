"""MKL's strict mode: products of few rows and of many are bitwise identical, and a user's own mode stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from rlinf_lite import numerics

INDEPENDENT = """
import json

import torch
from rlinf_lite import numerics

numerics.fix("cpu")
torch.manual_seed(0)
found = []
for terms in (8, 64, 96, 128, 256, 2048):
    rows = torch.randn(2, 100, terms)
    for keys in (torch.randn(2, terms, 48), torch.randn(2, 48, terms).transpose(1, 2)):
        together = torch.bmm(rows, keys)
        found += [torch.equal(torch.bmm(rows[:, :few].contiguous(), keys), together[:, :few]) for few in range(4, 40)]
print(json.dumps(found))
"""


@pytest.fixture
def no_settings(monkeypatch):
    """None of the variables is set, by the user or by `fix`; afterwards they are as before."""
    for name in numerics.KERNEL_VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(numerics, "_mkl_mode_is_ours", False)


@pytest.mark.skipif(not numerics.rows_are_independent(2048), reason="asked for on processors of Intel only")
@pytest.mark.parametrize("kernels", ["AVX512", "AVX2"])
def test_the_number_of_rows_does_not_matter(no_settings, monkeypatch, kernels):
    """As a processor without AVX-512 computes it, too."""
    monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", kernels)
    done = subprocess.run([sys.executable, "-c", INDEPENDENT], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("intel", "given", "exact"),
    [
        (True, {}, (True, True)),
        (True, {"MKL_CBWR": "AVX2,STRICT"}, (True, True)),
        (True, {"MKL_CBWR": "AVX2,strict"}, (False, False)),
        (True, {"MKL_CBWR": "COMPATIBLE"}, (False, False)),
        (True, {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}, (True, True)),
        (True, {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}, (False, False)),
        (False, {}, (True, False)),
    ],
    ids=str,
)
def test_only_intels_processors_are_asked_for_it(no_settings, monkeypatch, intel, given, exact):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(numerics, "_is_intel", lambda: intel)
    numerics.make_mkl_strict()
    assert os.environ.get("MKL_CBWR") == given.get("MKL_CBWR", "AUTO,STRICT" if intel else None)
    assert (numerics.rows_are_independent(64), numerics.rows_are_independent(128)) == exact
    assert numerics.kernel_settings() == given, "what a checkpoint names"


@pytest.mark.parametrize("given", [None, "AUTO,STRICT", "AVX2"])
def test_vllm_gets_only_a_users_own(no_settings, monkeypatch, given):
    monkeypatch.setattr(numerics, "_is_intel", lambda: True)
    if given is not None:
        monkeypatch.setenv("MKL_CBWR", given)
    numerics.make_mkl_strict()
    assert os.environ["MKL_CBWR"] == (given or "AUTO,STRICT")
    numerics.hand_over("cpu")
    assert os.environ.get("MKL_CBWR") == given
