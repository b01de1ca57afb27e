"""Reading live tensors during training: what the fence waits for, what it copies, and when a save is abandoned."""

import threading
import time

import pytest
import torch

from rlinf_lite.checkpoint.errors import SaveError
from rlinf_lite.checkpoint.live import HostBuffer, LiveTensors, StillTensors, exact


def opened(tensors, staged_fraction=0.0):
    live = LiveTensors(staged_fraction, HostBuffer())
    live.open([tensor.nbytes for tensor in tensors], lambda index: tensors[index])
    return live


def in_thread(act):
    thread = threading.Thread(target=act)
    thread.start()
    return thread


def test_the_fence_waits_until_the_last_is_read():
    live = opened([torch.ones(10), torch.ones(10)])
    fence = in_thread(lambda: live.fence(10))
    for index in range(2):
        with live.reading(index):
            time.sleep(0.05)
            assert fence.is_alive()
    fence.join(10)
    assert not fence.is_alive()


def test_before_it_is_known_what_is_read_the_fence_waits():
    live = LiveTensors(1.0, HostBuffer())
    fence = in_thread(lambda: live.fence(10))
    time.sleep(0.05)
    assert fence.is_alive()
    live.close()
    fence.join(10)
    assert not fence.is_alive()


def test_what_is_little_is_copied():
    tensors = [torch.ones(100), torch.full((10,), 2.0)]
    live = opened(tensors, staged_fraction=0.1)
    with live.reading(0) as first:
        assert first.data_ptr() == tensors[0].data_ptr()
    live.fence(10)
    tensors[1].zero_()
    with live.reading(1) as second:
        assert torch.equal(second, torch.full((10,), 2.0))


def test_a_save_whose_owner_could_not_wait_fails():
    live = opened([torch.ones(10), torch.ones(10)])
    live.fence(0.01)
    with pytest.raises(SaveError, match="abandoned"), live.reading(0):
        pass


def test_also_if_it_was_the_last_tensor_that_was_being_read():
    """What was written may be half old and half new, and nobody will ask for another tensor."""
    live = opened([torch.ones(10)])
    with pytest.raises(SaveError, match="abandoned"), live.reading(0):
        live.fence(0.01)


def test_a_read_in_time_is_no_failure():
    live = opened([torch.ones(10)])
    with live.reading(0):
        pass
    live.fence(0)
    live.close()
    live.fence(0)


@pytest.mark.parametrize(
    "view",
    [
        torch.arange(12.0).reshape(3, 4)[1:],
        torch.arange(12).reshape(3, 4)[:, 1],
        torch.arange(12.0).bfloat16()[5],
        torch.empty(0, 4),
        torch.ones(4, 0, 2)[2:],
        torch.arange(4.0),
    ],
)
def test_exact_holds_the_same_values_and_nothing_else(view):
    found = exact(view)
    assert torch.equal(found, view) and found.dtype == view.dtype and found.shape == view.shape
    assert found.untyped_storage().nbytes() == view.nbytes


def test_exact_copies_nothing_that_lies_in_one_piece():
    whole = torch.arange(12.0).reshape(3, 4)
    assert exact(whole[1:]).data_ptr() == whole[1:].data_ptr()
    assert exact(whole) is whole


def test_still_tensors_are_read_in_place_and_in_a_storage_of_their_size():
    whole = torch.arange(10.0, requires_grad=True)
    still = StillTensors([whole, whole[2:4]].__getitem__, HostBuffer())
    with still.reading(0) as first, still.reading(1) as second:
        assert first.data_ptr() == whole.data_ptr() and not first.requires_grad
        assert second.tolist() == [2.0, 3.0] and second.untyped_storage().nbytes() == second.nbytes
