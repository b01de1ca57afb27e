"""Our safetensors writer, read back by the safetensors package, and sizes on the command line."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from rlinf_lite.errors import UserError
from rlinf_lite.export.safetensors_file import Spec, parse_size, write

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_types_of_all_widths_are_aligned(tmp_path):
    """The safetensors package reads what was written."""
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "mask": torch.tensor([True, False]),
        "half": torch.randn(3, 5).bfloat16(),
        "wide": torch.randint(0, 2**40, (3,)),
        "empty": torch.empty(0, 4),
        "turned": torch.randn(4, 3).t(),
        "naïve": torch.randn(2).half(),
    }
    specs = {name: Spec(dtype=tensor.dtype, shape=tuple(tensor.shape)) for name, tensor in tensors.items()}
    with (tmp_path / "x.safetensors").open("wb") as stream:
        write(stream, specs, tensors.__getitem__)
    back = load_file(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in tensors.items())
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    with pytest.raises(UserError, match=r"odd is torch\.complex64"), (tmp_path / "y").open("wb") as stream:
        write(stream, {"odd": Spec(dtype=torch.complex64, shape=(1,))}, tensors.__getitem__)


@pytest.mark.parametrize("size", ["2GB", "500mb", "1.5 KiB", "7"])
def test_sizes(size):
    assert parse_size(size) == {"2GB": 2 * 10**9, "500mb": 500 * 10**6, "1.5 KiB": 1536, "7": 7}[size]
    for wrong in ("", "GB", "0", "-1", "2 parsecs", "0.1"):
        with pytest.raises(ValueError, match="is not a size"):
            parse_size(wrong)
