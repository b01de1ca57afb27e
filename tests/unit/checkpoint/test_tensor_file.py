"""Tensors in the format of torch.save: byte for byte the same, and read back."""

import io

import pytest
import torch

from rlinf_lite.checkpoint.formats.tensor_file import EntryDecoder, EntryEncoder

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]
SHAPES = [(), (1,), (7, 5), (3, 1, 2), (0, 4), (70_000,)]


@pytest.fixture(autouse=True)
def no_checksums():
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(before)


def make(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


def saved(tensor):
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.getvalue()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bytes_are_those_of_torch_save_and_come_back(dtype):
    encoder, decoder = EntryEncoder(), EntryDecoder()
    for seed in range(3):
        for shape in SHAPES:
            tensor, stream = make(shape, dtype, seed), io.BytesIO()
            encoder.write(tensor, stream)
            assert stream.getvalue() == saved(tensor), (seed, shape)
            back = decoder.decode(memoryview(bytearray(stream.getvalue())))
            assert back.dtype == dtype and back.shape == tensor.shape and torch.equal(back, tensor)


def test_a_transposed_tensor():
    tensor, stream = make((4, 6), torch.float32, 1).t(), io.BytesIO()
    EntryEncoder().write(tensor, stream)
    assert torch.equal(EntryDecoder().decode(memoryview(bytearray(stream.getvalue()))), tensor)


def test_forms_of_the_same_length_are_told_apart():
    decoder = EntryDecoder()
    for _ in range(2):
        for tensor in (make((2, 3), torch.float32, 1), make((3, 2), torch.float32, 2), make((6,), torch.float32, 3)):
            content = memoryview(bytearray(saved(tensor)))
            back = decoder.decode(content)
            assert back.shape == tensor.shape and torch.equal(back, tensor)


def test_an_entry_with_the_head_of_another_and_no_values_is_refused():
    decoder, content = EntryDecoder(), bytearray(saved(make((70_000,), torch.float32, 1)))
    decoder.decode(memoryview(content))
    with pytest.raises(Exception):  # noqa: B017  (whatever a zip reader says to that)
        decoder.decode(memoryview(content[:1000]))
