"""The garbage collector's pause while libraries are imported."""

import gc

import pytest

from rlinf_lite.quick_imports import quick_imports


@pytest.fixture(autouse=True)
def unfrozen():
    yield
    gc.enable()
    gc.unfreeze()


def test_the_collector_pauses_and_comes_back():
    with quick_imports():
        assert not gc.isenabled()
        with quick_imports():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() > 0


def test_it_comes_back_after_an_error():
    with pytest.raises(ImportError), quick_imports():
        raise ImportError
    assert gc.isenabled()


def test_garbage_from_later_is_still_collected():
    with quick_imports():
        pass
    cycle: list = []
    cycle.append(cycle)
    del cycle
    assert gc.collect() > 0
