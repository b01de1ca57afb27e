"""Directories that are not a checkpoint but were given as one: every command says what they are and what to give."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest

from rlinf_lite.checkpoint import CheckpointError, NoCheckpoint, select
from rlinf_lite.checkpoint.__main__ import main as command
from rlinf_lite.eval.source import opened

SCRIPTS = Path(__file__).parents[3] / "toolkits" / "ckpt_convertor"


@pytest.fixture
def lay_out(tmp_path, save, add_critic, make_state):
    """Directories of every kind beside the checkpoints 4 and 8 of a run."""
    newest = add_critic([save(4), save(8)][1], make_state(8))
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(newest.parent)
    verl = tmp_path / "verl" / "global_step_8" / "actor"
    verl.mkdir(parents=True)
    (verl / "model_world_size_8_rank_0.pt").write_bytes(b"x")
    rlinf = tmp_path / "rlinf" / "checkpoints" / "global_step_8" / "actor" / "dcp_checkpoint"
    rlinf.mkdir(parents=True)
    (rlinf / ".metadata").write_bytes(b"x")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    return {
        "root": newest.parent,
        "run": run,
        "actor": newest / "actor",
        "critic": newest / "critic",
        "data": newest / "data",
        "verl": verl.parent,
        "verl actor": verl,
        "rlinf": rlinf.parent.parent,
        "rlinf root": rlinf.parent.parent.parent,
        "rlinf actor": rlinf.parent,
        "hf": tmp_path / "hf",
    }


KINDS = [
    ("root", "holds checkpoints; did you mean"),
    ("run", "is the directory of a run; did you mean"),
    ("actor", "is a part of a checkpoint; did you mean"),
    ("critic", "is a part of a checkpoint; did you mean"),
    ("data", "is a part of a checkpoint; did you mean"),
    ("verl", "is a checkpoint of verl"),
    ("verl actor", "is a checkpoint of verl"),
    ("rlinf", "is a checkpoint of RLinf"),
    ("rlinf root", "is a checkpoint of RLinf"),
    ("rlinf actor", "is a checkpoint of RLinf"),
    ("hf", "is a Hugging Face directory; give it as actor.model.model_path"),
]


@pytest.mark.parametrize(("kind", "said"), KINDS)
def test_to_resume_from(lay_out, root, kind, said):
    with pytest.raises(NoCheckpoint) as caught:
        select(str(lay_out[kind]), root, verify="full")
    message = str(caught.value)
    assert str(lay_out[kind]) in message and said in message and len(message.splitlines()) == 1
    if "did you mean" in said:
        assert "global_step_8" in message.partition("did you mean")[2]


@pytest.mark.parametrize(("kind", "said"), [row for row in KINDS if row[0] not in ("root", "run", "hf")])
def test_to_evaluate(lay_out, kind, said):
    with pytest.raises(CheckpointError) as caught, opened(str(lay_out[kind]), "full"):
        pass
    assert said in str(caught.value)


@pytest.mark.parametrize(("kind", "said"), KINDS)
@pytest.mark.parametrize("words", [["show"], ["diff", "checkpoint"]])
def test_to_look_at(lay_out, kind, said, words, capsys):
    words = [str(lay_out["root"] / "global_step_4") if word == "checkpoint" else word for word in words]
    assert command([*words, str(lay_out[kind])]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("script", ["convert_dcp_to_state_dict", "convert_dcp_to_hf"])
@pytest.mark.parametrize(("kind", "said"), [row for row in KINDS if row[0] in ("root", "run", "data", "verl", "hf")])
def test_to_convert(lay_out, kind, said, script, capsys, tmp_path):
    main = runpy.run_path(str(SCRIPTS / f"{script}.py"))["main"]
    assert main(["--dcp_path", str(lay_out[kind]), "--output_path", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("relative", [True, False])
def test_a_link_is_the_checkpoint_that_it_leads_to(save, root, tmp_path, relative):
    path = save(8)
    link = tmp_path / "latest"
    link.symlink_to(os.path.relpath(path, tmp_path) if relative else path)
    (tmp_path / "again").symlink_to(link)
    for given in (link, tmp_path / "again"):
        assert select(str(given), root, verify="full").path == path.resolve()
        with opened(str(given), "full") as source:
            assert source.manifest is not None and source.manifest.step == 8


def test_a_link_to_something_else_is_told_what_it_is(save, root, tmp_path):
    (tmp_path / "latest").symlink_to(save(8).parent)
    with pytest.raises(NoCheckpoint, match="holds checkpoints; did you mean"):
        select(str(tmp_path / "latest"), root, verify="full")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(NoCheckpoint, match="no such checkpoint"):
        select(str(tmp_path / "gone"), root, verify="full")
