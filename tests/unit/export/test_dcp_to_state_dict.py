"""Checkpoints to state dicts: a model loads them strictly and gives the same logits."""

import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, LlamaConfig

from rlinf_lite import readable
from rlinf_lite.checkpoint import Checkpointer
from rlinf_lite.ties import tied_names
from rlinf_lite.weights.names import named_weights

SCRIPT = Path(__file__).parents[3] / "toolkits" / "ckpt_convertor" / "convert_dcp_to_state_dict.py"
INPUT_IDS = torch.tensor([[1, 5, 3, 2]])

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def config_of(tied, **more):
    return LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        **more,
    )


@pytest.fixture
def make_model():
    def make(tied, seed=0):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config_of(tied), dtype=torch.float32).eval()

    return make


@pytest.fixture
def make_critic():
    def make(seed=0):
        torch.manual_seed(seed)
        return AutoModelForTokenClassification.from_config(config_of(False, num_labels=1), dtype=torch.float32)

    return make


@pytest.fixture
def checkpoint_of(tmp_path):
    """Save a model as the trainer does, optimizer and all."""

    def save(model, step=5):
        state = {
            "model": dict(named_weights(model)),
            "optim": {"step": torch.tensor(1.0)},
            "num_updates": torch.tensor(1),
        }
        checkpointer = Checkpointer(tmp_path / "checkpoints", seed=0)
        return checkpointer.save(step, state, data={}, info={"tied": tied_names(model)}).path

    return save


@pytest.fixture
def rlinf_checkpoint_of(tmp_path):
    """As RLinf writes it: everything below one key, with objects that only a pickle can hold."""

    def save(model):
        actor = tmp_path / "rlinf" / "global_step_5" / "actor"
        everything = {
            "model": model.state_dict(),
            "optimizers": {
                "state": {"w": {"step": torch.tensor(1.0)}},
                "param_groups": [{"lr": 0.1, "betas": (0.9, 1)}],
            },
            "lr_schedulers": {"last_epoch": 3, "_last_lr": [0.1]},
            "rng": {"cpu": torch.get_rng_state(), "python": (3, (1, 2), None)},
        }
        dcp.save({"fsdp_checkpoint": everything}, checkpoint_id=actor / "dcp_checkpoint", no_dist=True)
        return actor

    return save


@pytest.fixture
def convert(capsys):
    """``convert(dcp_path, output_path, ...)``: exit code and output."""
    main = runpy.run_path(str(SCRIPT))["main"]

    def run(dcp_path, output_path, *more):
        code = main(["--dcp_path", str(dcp_path), "--output_path", str(output_path), *more])
        out, err = capsys.readouterr()
        return code, err if code else out

    return run


def assert_same_model(file, model, other):
    state = torch.load(file, weights_only=True)
    other.load_state_dict(state, strict=True)
    with torch.no_grad():
        assert torch.equal(other(INPUT_IDS).logits, model(INPUT_IDS).logits)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    return state


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("inside", ["", "actor"])
def test_our_checkpoint(make_model, checkpoint_of, convert, tmp_path, tied, inside):
    model = make_model(tied)
    code, printed = convert(checkpoint_of(model) / inside, tmp_path / "out.pt")
    assert code == 0
    assert str(tmp_path / "out.pt") in printed
    state = assert_same_model(tmp_path / "out.pt", model, make_model(tied, seed=1))
    shared = state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    assert shared == tied


def test_a_tied_tensor_is_written_once(make_model, checkpoint_of, convert, tmp_path):
    convert(checkpoint_of(make_model(True), 1), tmp_path / "tied.pt")
    convert(checkpoint_of(make_model(False), 2), tmp_path / "untied.pt")
    assert (tmp_path / "untied.pt").stat().st_size - (tmp_path / "tied.pt").stat().st_size >= 16 * 8 * 4


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("inside", ["dcp_checkpoint", "", ".."])
def test_a_checkpoint_of_rlinf(make_model, rlinf_checkpoint_of, convert, tmp_path, tied, inside):
    model = make_model(tied)
    assert convert(rlinf_checkpoint_of(model) / inside, tmp_path / "out.pth")[0] == 0
    assert_same_model(tmp_path / "out.pth", model, make_model(tied, seed=1))


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_saved_by_itself(make_model, convert, tmp_path, tied):
    model = make_model(tied)
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert convert(tmp_path / "dcp", tmp_path / "out.pt")[0] == 0
    assert_same_model(tmp_path / "out.pt", model, make_model(tied, seed=1))


def test_a_directory_gets_a_file(make_model, checkpoint_of, convert, tmp_path):
    model = make_model(True)
    assert convert(checkpoint_of(model), tmp_path / "new" / "directory")[0] == 0
    files = list((tmp_path / "new" / "directory").iterdir())
    assert [file.name for file in files] == ["model_state_dict.pt"]
    assert_same_model(files[0], model, make_model(True, seed=1))


def test_an_existing_file_is_kept_unless_told_otherwise(make_model, checkpoint_of, convert, tmp_path, assert_refused):
    model, file = make_model(True), tmp_path / "out.bin"
    path = checkpoint_of(model)
    file.write_text("precious")
    assert_refused(convert(path, file), str(file), "--overwrite")
    assert file.read_text() == "precious"
    assert convert(path, file, "--overwrite")[0] == 0
    assert_same_model(file, model, make_model(True, seed=1))


def test_a_damaged_checkpoint_is_refused(make_model, checkpoint_of, convert, tmp_path, assert_refused):
    path = checkpoint_of(make_model(True))
    shard = path / "actor" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    for inside in ("", "actor"):
        assert_refused(convert(path / inside, tmp_path / "out.pt"), str(shard), "blake3")
    assert not (tmp_path / "out.pt").exists()


def test_a_critic(make_model, make_critic, checkpoint_of, add_critic, convert, tmp_path, assert_refused):
    """global_step_N/critic means the critic, whose model has no tied names; global_step_N alone means the actor."""
    model, critic = make_model(True), make_critic()
    path = add_critic(checkpoint_of(model), {"model": dict(named_weights(critic))})
    assert convert(path, tmp_path / "actor.pt")[0] == 0
    assert_same_model(tmp_path / "actor.pt", model, make_model(True, seed=1))
    assert convert(path / "critic", tmp_path / "critic.pt")[0] == 0
    state = torch.load(tmp_path / "critic.pt", weights_only=True)
    assert "score.weight" in state and "lm_head.weight" not in state
    loaded = make_critic(seed=1)
    loaded.load_state_dict(state, strict=True)
    assert all(torch.equal(tensor, critic.state_dict()[name]) for name, tensor in loaded.state_dict().items())

    shutil.rmtree(path / "actor")
    assert_refused(convert(path / "critic", tmp_path / "out.pt"), "actor/.metadata is missing")
    alone = Checkpointer(tmp_path / "alone", section="critic").save(1, {"model": dict(named_weights(critic))}).path
    assert_refused(convert(alone, tmp_path / "out.pt"), f"{alone}: has no section actor/, only critic/")


@pytest.mark.parametrize("inside", ["", "actor"])
def test_an_uncommitted_save_is_refused(make_model, checkpoint_of, convert, tmp_path, inside, assert_refused):
    path = checkpoint_of(make_model(True))
    (path / "manifest.json").unlink()
    stage = path.rename(path.with_name("global_step_5.tmp-00000000"))
    assert_refused(convert(stage / inside, tmp_path / "out.pt"), "never committed")


def test_a_missing_directory(convert, tmp_path, assert_refused):
    assert_refused(convert(tmp_path / "nowhere", tmp_path / "out.pt"), "nowhere: no such directory")


def test_a_directory_of_something_else(convert, tmp_path, assert_refused):
    (tmp_path / "else").mkdir()
    assert_refused(convert(tmp_path / "else", tmp_path / "out.pt"), "global_step_N", "actor/dcp_checkpoint")


def test_a_directory_without_a_model_lists_what_it_has(convert, tmp_path, assert_refused):
    dcp.save({"policy": {"w": torch.ones(2)}, "value": torch.ones(1)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert_refused(convert(tmp_path / "dcp", tmp_path / "out.pt"), "its top-level groups are: policy, value")


def test_a_tie_to_nothing_is_refused(tmp_path, convert, assert_refused):
    state = {"model": {"a": torch.ones(1)}}
    Checkpointer(tmp_path, seed=0).save(1, state, data={}, info={"tied": {"b": "c"}})
    assert_refused(convert(tmp_path / "global_step_1", tmp_path / "out.pt"), "b is tied to c, which is missing")


def test_an_output_that_cannot_be_written(make_model, checkpoint_of, convert, tmp_path, assert_refused):
    (tmp_path / "file").write_text("")
    assert_refused(convert(checkpoint_of(make_model(True)), tmp_path / "file" / "out.pt"), str(tmp_path / "file"))
    (tmp_path / "directory.pt").mkdir()
    assert_refused(convert(tmp_path, tmp_path / "directory.pt"), "it is a directory")


def test_a_full_disk_leaves_nothing(make_model, checkpoint_of, tmp_path, convert, largest_file, assert_refused):
    path, out = checkpoint_of(make_model(True)), tmp_path / "out"
    out.mkdir()
    with largest_file(4096):
        assert_refused(convert(path, out), "File too large")
    assert list(out.iterdir()) == []


def test_as_a_command_from_elsewhere(make_model, checkpoint_of, tmp_path, run_forked):
    model = make_model(True)
    path = checkpoint_of(model)

    done = run_forked(SCRIPT, "--dcp_path", ".", "--output_path", "../../out", cwd=path)
    assert (done.returncode, done.stderr) == (0, "")
    assert_same_model(tmp_path / "out" / "model_state_dict.pt", model, make_model(True, seed=1))
    refused = run_forked(SCRIPT, "--dcp_path", "nowhere", "--output_path", "../../other", cwd=path)
    assert refused.returncode == 2
    assert re.fullmatch(r"error: .*nowhere: no such directory\n", refused.stderr)


def test_help_shows_an_example(convert, capsys):
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPT))["main"](["-h"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for text in ("--dcp_path", "--output_path", "--overwrite", "example:", "global_step_50"):
        assert text in printed


def torchtitan(model, **more):
    """As torchtitan writes it: the model's names at the top level, optimizer and train state beside them."""
    adam = {"exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3), "step": torch.tensor(1.0)}
    return {
        **model.state_dict(),
        "optimizer": {f"state.{name}.{key}": held for name in model.state_dict() for key, held in adam.items()},
        "lr_scheduler": {"last_epoch": torch.tensor(3)},
        "train_state": {"step": torch.tensor(3, dtype=torch.int32), "ntokens_seen": torch.tensor(9)},
        "dataloader": {"dp_rank_0": torch.zeros(4)},
        **more,
    }


@pytest.mark.parametrize("tied", [True, False])
def test_torchtitan_with_optimizer_gives_the_model_alone(make_model, convert, tmp_path, tied):
    model = make_model(tied)
    state = torchtitan(model)
    if tied:
        del state["lm_head.weight"]
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    code, printed = convert(tmp_path / "dcp", tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    assert code == 0 and found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    num_adam_tensors = 3 * len(model.state_dict())
    left_out = "dataloader (1 tensors), lr_scheduler (1 tensors), "
    left_out += f"optimizer ({num_adam_tensors} tensors), train_state (2 tensors)"
    assert f"note: not of the model, so not written: {left_out}" in printed
    assert f"wrote {len(wanted)} tensors, {readable.size((tmp_path / 'out.pt').stat().st_size)}: " in printed


def test_torchtitan_with_its_own_names(make_model, convert, tmp_path):
    names = ["tok_embeddings.weight", "layers.0.attention.wq.weight", "norm.weight", "output.weight"]
    weights = {name: torch.ones(4, 2) for name in names}
    state = weights | {"optimizer": {"state.output.weight.exp_avg": torch.zeros(4, 2)}}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert convert(tmp_path / "dcp", tmp_path / "out.pt")[0] == 0
    assert torch.load(tmp_path / "out.pt", weights_only=True).keys() == weights.keys()


def test_a_whole_application_gives_the_model_alone(make_model, convert, tmp_path):
    model = make_model(False)
    everything = {"model": model.state_dict(), "optimizers": {"state": {"x": torch.ones(1)}}, "progress": {"step": 1}}
    state = {"app": everything}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert convert(tmp_path / "dcp", tmp_path / "out.pt")[0] == 0
    assert_same_model(tmp_path / "out.pt", model, make_model(False, seed=1))


@pytest.mark.parametrize(
    "more", [{"value_head": {"weight": torch.ones(2)}}, {"model.embed_tokens.weight.exp_avg": torch.ones(2)}]
)
def test_ambiguous_names_are_refused(make_model, convert, tmp_path, more, assert_refused):
    dcp.save(torchtitan(make_model(False), **more), checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert_refused(convert(tmp_path / "dcp", tmp_path / "out.pt"), next(iter(more)), "neither known as weights")
    assert not (tmp_path / "out.pt").exists()


def test_optimizer_state_beside_bare_names_is_never_weights(make_model, convert, tmp_path, assert_refused):
    state = dict(make_model(False).state_dict()) | {"lm_head.weight.exp_avg": torch.ones(2)}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert_refused(convert(tmp_path / "dcp", tmp_path / "out.pt"), "lm_head.weight.exp_avg")
