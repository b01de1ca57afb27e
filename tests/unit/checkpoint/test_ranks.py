"""Collectives without a process group, and errors that must reach other ranks."""

import pickle

import pytest

from rlinf_lite.checkpoint import errors
from rlinf_lite.checkpoint.ranks import Ranks


class NeedsTwo(Exception):
    """Pickles, and cannot be unpickled."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def test_alone_everything_is_rank_0():
    ranks = Ranks()
    assert (ranks.rank, ranks.size, ranks.distributed) == (0, 1, False)
    assert ranks.gather("x") == ["x"]
    assert ranks.together(lambda: "x") == "x"
    assert ranks.first(lambda: "x") == "x"


def test_an_error_says_on_which_rank_it_was():
    with pytest.raises(ValueError, match="why") as caught:
        Ranks().together(lambda: int("why"))
    assert caught.value.__notes__ == ["on rank 0"]


def test_an_error_that_cannot_be_pickled_is_replaced_by_one_with_its_text():
    def fail():
        raise NeedsTwo("this", "that")

    with pytest.raises(RuntimeError, match="NeedsTwo: this and that") as caught:
        Ranks().together(fail)
    assert str(pickle.loads(pickle.dumps(caught.value))) == "NeedsTwo: this and that"


@pytest.mark.parametrize(
    "kind",
    [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.CheckpointError)],
)
def test_every_error_can_be_pickled(kind):
    error = kind("global_step_5: why")
    error.add_note("on rank 1")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == "global_step_5: why"
    assert copy.__notes__ == ["on rank 1"]
