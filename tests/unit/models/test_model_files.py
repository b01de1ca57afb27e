"""Unreadable files of a model directory are named, with line and remedy, and never block."""

from __future__ import annotations

import os
import shutil

import pytest

from rlinf_lite.errors import ConfigError
from rlinf_lite.models import hf_directory
from rlinf_lite.models.files import check_files

KEY = "actor.model.model_path"
NAMES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def embedded(tmp_path):
    return shutil.copytree(hf_directory.resolve("embedded:tiny-arithmetic"), tmp_path / "model")


def refusal(path) -> str:
    with pytest.raises(ConfigError) as caught:
        check_files(path, KEY)
    message = str(caught.value)
    assert message.startswith(f"{KEY}={path}: ")
    return message.removeprefix(f"{KEY}={path}: ")


@pytest.mark.parametrize("name", NAMES)
def test_broken_json_is_named_with_its_line(embedded, name):
    check_files(embedded, KEY)
    (embedded / name).write_text('{\n "a": 1,\n')
    assert refusal(embedded).startswith(f"{name}: not valid JSON at line 3 column 1 (")
    (embedded / name).write_text("")
    assert refusal(embedded).startswith(f"{name}: not valid JSON at line 1 column 1 (")
    (embedded / name).write_bytes(b'{"a": "\xff"}')
    assert refusal(embedded).startswith(f"{name}: not readable as JSON (")


@pytest.mark.parametrize("name", [*NAMES, "model.safetensors"])
def test_a_pipe_a_directory_a_lost_link_and_a_pointer(embedded, name):
    (embedded / name).unlink()
    os.mkfifo(embedded / name)
    assert refusal(embedded).startswith(f"{name} is not a regular file")
    (embedded / name).unlink()
    (embedded / name).symlink_to("nowhere")
    assert refusal(embedded).startswith(f"{name} is a broken symbolic link")
    (embedded / name).unlink()
    (embedded / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert refusal(embedded) == f"{name} is a Git LFS pointer, not the file; run git lfs pull"
    (embedded / name).unlink()
    (embedded / name).mkdir()
    assert refusal(embedded).startswith(f"{name} is not a regular file")


def test_json_of_another_shape_is_a_config_error(embedded):
    (embedded / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"config\.json holds a list, not an object"):
        hf_directory.load_config(embedded, None)
    (embedded / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Poem"}}')
    with pytest.raises(ConfigError, match=r"actor\.tokenizer\.tokenizer_model=.*no usable tokenizer"):
        hf_directory.load_tokenizer(embedded)
    (embedded / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not valid JSON at line 1 column 2"):
        hf_directory.load_tokenizer(embedded)
