"""`quick_imports`: what is imported is the same, with less work."""

from __future__ import annotations

import functools
import gc
import subprocess
import sys

from rlinf_lite.quick_imports import quick_imports

COUNTED = """
import builtins, collections
opened, true = collections.Counter(), builtins.open
def counted(file, *args, **kwargs):
    opened[str(file)] += 1
    return true(file, *args, **kwargs)
builtins.open = counted
from rlinf_lite.quick_imports import quick_imports
with quick_imports():
    import transformers.models
read = [times for name, times in opened.items() if name.startswith(transformers.models.__path__[0])]
print(len(read) > 128, max(read), transformers.LlamaConfig is transformers.models.LlamaConfig)
"""


def test_transformers_reads_its_directories_once():
    printed = subprocess.run([sys.executable, "-c", COUNTED], check=True, capture_output=True, text=True).stdout
    assert printed.split() == ["True", "1", "True"]


def test_nothing_stays_changed(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers", raising=False)  # or there is nothing to be changed
    before = functools.lru_cache
    with quick_imports(), quick_imports():
        assert functools.lru_cache is not before
        assert functools.lru_cache(lambda: None).cache_parameters() == {"maxsize": 128, "typed": False}
        assert functools.lru_cache(8)(lambda: None).cache_parameters()["maxsize"] == 8
    assert functools.lru_cache is before and gc.isenabled()
