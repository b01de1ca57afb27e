"""Each architecture trains on two ranks, resumes bit-exact, and exports a bitwise identical model."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlinf_lite import rng as rngs
from rlinf_lite.algorithms import build_algorithm
from rlinf_lite.checkpoint import Checkpointer
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.config import Config
from rlinf_lite.eval.engine import build_engine
from rlinf_lite.eval.settings import configure
from rlinf_lite.eval.source import opened
from rlinf_lite.models.hf_directory import load_tokenizer, resolve
from rlinf_lite.ties import tied_names
from rlinf_lite.training.batch import SplitSettings, StepBatch, StepRows
from rlinf_lite.training.fsdp.build import build_policy
from rlinf_lite.training.ranks import shard_mini_batch
from rlinf_lite.training.update import update
from rlinf_lite.types import Column, GenerationBatch, Group, Problem, Prompt, Response, Sampling

TOOLS = Path(__file__).parents[2] / "toolkits" / "ckpt_convertor"
EMBEDDED = "embedded:tiny-arithmetic"
SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FAMILIES = {
    "gpt2": {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, **ENDS},
    "qwen2": SIZES,
    "qwen3": SIZES,
    "llama": SIZES,
    "gemma": SIZES,
    "gemma2": {**SIZES, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        **SIZES,
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
MATRIX = [f"{family}-{tie}" for family in FAMILIES for tie in ("tied", "untied")]
FEW = ["gpt2-tied", "qwen3-untied", "llama-tied"]
IDS = torch.tensor([[1, 5, 9, 3, 14, 17, 8, 4, 11, 12, 13, 6], [1, 3, 3, 17, 10, 15, 6, 7, 8, 9, 5, 4]])
PROMPTS = [(1, 5, 9, 3, 14), (1, 6), (1, 4, 4, 4, 4, 4, 4, 4, 4), (1, 7, 8)]


def base_directory(root: Path, case: str) -> Path:
    """An untrained model with the embedded model's tokenizer and a chat template, as people bring one."""
    family, tie = case.split("-")
    directory = root / case / "base"
    config = AutoConfig.for_model(family, **{**FAMILIES[family], "tie_word_embeddings": tie == "tied"})
    torch.manual_seed(len(case))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    for file in resolve(EMBEDDED).glob("tokenizer*"):
        shutil.copyfile(file, directory / file.name)
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 19], "temperature": 0.7}))
    return directory


def settings() -> Config:
    config = Config()
    config.algorithm.training_batch_size_per_gpu = 2
    config.actor.optim.lr = 0.01
    config.actor.optim.weight_decay = 0.1
    return config


def group(index: int, prompt_ids, responses) -> Group:
    problem = Problem(problem_id=index, prompt="", answer="", prompt_ids=tuple(prompt_ids), source="made")
    return Group(
        prompt=Prompt(prompt_index=index, epoch=0, problem=problem),
        responses=tuple(
            Response(
                sample_index=sample,
                token_ids=np.array(ids),
                loss_mask=np.ones(len(ids), dtype=bool),
                logprobs=None,
                finished=True,
                text="",
                weights_step=0,
            )
            for sample, ids in enumerate(responses)
        ),
    )


def groups() -> list[Group]:
    rng = np.random.default_rng(0)
    lengths = [(3, (12, 1)), (7, (9, 2)), (1, (14, 1))]
    return [
        group(i, rng.integers(3, 20, prompt).tolist(), [rng.integers(3, 20, response) for response in responses])
        for i, (prompt, responses) in enumerate(lengths)
    ]


def train_save_resume(rank, world_size, cases, steps):
    """For each directory: save after one step and continue; a new trainer loads and continues; both must be equal."""
    mesh = init_device_mesh("cpu", (world_size,))
    return {case: _train_save_resume(mesh, rank, Path(directory), steps) for case, directory in cases.items()}


def _train_save_resume(mesh, rank, directory, steps):
    config = settings()
    rngs.reseed(1, 0, rank)
    checkpointer = Checkpointer(directory.parent / "checkpoints", seed=1)
    trainer = _trainer(mesh, directory, config)
    before = _weights(trainer)
    _step(trainer, config, 1)
    info = {"tied": tied_names(trainer.model), "model_path": str(directory)}
    path = checkpointer.save(1, trainer.state(), data={}, info=info).path
    logprobs, weights = _logprobs(trainer, config), _weights(trainer)
    assert any(not torch.equal(before[name], value) for name, value in _weights(trainer).items()), "nothing was learned"
    for number in range(2, 2 + steps):
        _step(trainer, config, number)

    torch.rand(5)
    resumed = _trainer(mesh, directory, config)
    checkpointer.load(path, resumed.state())
    assert torch.equal(_logprobs(resumed, config), logprobs)
    for number in range(2, 2 + steps):
        _step(resumed, config, number)
    one, other = _everything(trainer), _everything(resumed)
    assert one.keys() == other.keys()
    differ = [name for name, value in one.items() if not torch.equal(value, other[name])]
    return {
        "path": str(path),
        "logprobs": logprobs,
        "weights": weights,
        "differ": differ,
        "tied": tied_names(resumed.model),
    }


def _trainer(mesh, directory, config):
    return build_policy(config.actor, config.algorithm, model_dir=directory, mesh=mesh, device=torch.device("cpu"))


def _step(trainer, config, number):
    batch = _batch(groups(), config, number)
    advantages = torch.tensor([1.2, -0.7, 0.4, -1.5, 0.9, 2.0])
    columns = {Column.ADVANTAGE: advantages.repeat_interleave(torch.from_numpy(batch.num_tokens_N))}
    loss = build_algorithm(config.algorithm).losses().policy
    for mini_batch in batch.for_update(columns, batch.num_tokens_N > 0):
        mine = shard_mini_batch(mini_batch, trainer.world_size, virtual_ranks=5040)[trainer.rank]
        update(trainer, mine, loss, lr=0.01)


def _batch(of, config, number):
    settings = SplitSettings.of(config.algorithm, config.runner, seed=1)
    return StepBatch(StepRows(of, step=number, settings=settings), [True] * sum(len(one.responses) for one in of))


def _everything(trainer):
    """Parameters and optimizer state, whole."""
    state = trainer.state()
    adam = {f"{name}.{key}": value for name, held in state["optim"].items() for key, value in held.items()}
    return {name: _whole(tensor) for name, tensor in {**state["model"], **adam}.items()}


def _weights(trainer):
    return {name: _whole(tensor).clone() for name, tensor in trainer.state()["model"].items()}


def _whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _logprobs(trainer, config):
    """Of every token of `IDS` but the first, [B, T - 1]."""
    of = [group(i, ids[:1], [ids[1:]]) for i, ids in enumerate(IDS.tolist())]
    units = _batch(of, config, 1).for_forward()
    found = trainer.forward(units)  # each rank computes all of them
    return torch.cat([found[index] for index in sorted(found)]).reshape(len(IDS), -1)


@pytest.fixture
def trained(run_ranks, tmp_path):
    def train(cases, steps):
        directories = {case: str(base_directory(tmp_path, case)) for case in cases}
        return run_ranks(train_save_resume, 2, timeout=240, cases=directories, steps=steps)

    return train


@pytest.fixture
def export():
    main = runpy.run_path(str(TOOLS / "convert_dcp_to_hf.py"))["main"]

    def run(checkpoint, directory):
        assert main(["--dcp_path", str(checkpoint), "--output_path", str(directory)]) == 0
        return directory

    return run


def greedy(checkpoint, prompts):
    """What an evaluation of the checkpoint generates."""
    with opened(str(checkpoint), "full") as source:
        config = configure(source, {"data.type": "arithmetic"})
        engine = build_engine(config, source, torch.device("cpu"))
    sampling = Sampling(
        do_sample=False, temperature=1.0, top_k=-1, top_p=1.0, repetition_penalty=1.0, max_new_tokens=12
    )
    problems = [
        Problem(problem_id=i, prompt="", answer="", prompt_ids=ids, source="made") for i, ids in enumerate(prompts)
    ]
    batch = GenerationBatch(
        stream="val",
        step=1,
        index=0,
        prompts=tuple(Prompt(prompt_index=p.problem_id, epoch=0, problem=p) for p in problems),
        group_size=1,
        sampling=sampling,
        seed=0,
    )
    return [group.responses[0].token_ids.tolist() for group in engine.generate(batch)]


def generated(model, prompts):
    """`generate` of transformers, a prompt at a time: nothing is padded."""
    responses = []
    for ids in prompts:
        out = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones((1, len(ids)), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=[2, 19],
            pad_token_id=0,
        )
        responses.append(out[0, len(ids) :].tolist())
    return responses


def check(cases, steps, trained, export, tmp_path):
    ranks = trained(cases, steps)
    for case in cases:
        made, other = (rank[case] for rank in ranks)
        assert made["differ"] == other["differ"] == [], case
        assert torch.equal(made["logprobs"], other["logprobs"]), case
        assert bool(made["tied"]) == case.endswith("-tied"), case
        assert manifests.read(Path(made["path"])).info["tied"] == made["tied"]

        base, exported = tmp_path / case / "base", export(made["path"], tmp_path / case / "exported")
        model = AutoModelForCausalLM.from_pretrained(exported).eval()
        weights = model.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in made["weights"].items()), case
        with torch.no_grad():
            logprobs = model(input_ids=IDS, use_cache=False).logits[:, :-1].log_softmax(-1)
        expected = logprobs.gather(2, IDS[:, 1:, None]).squeeze(2)
        torch.testing.assert_close(made["logprobs"], expected, rtol=0, atol=1e-5, msg=case)
        assert {file.name for file in base.iterdir()} == {file.name for file in exported.iterdir()}
        tokenizer = AutoTokenizer.from_pretrained(exported)
        assert tokenizer("57+38=")["input_ids"] == load_tokenizer(resolve(EMBEDDED))("57+38=")["input_ids"]
        assert tokenizer.apply_chat_template([{"role": "user", "content": "1+2="}], tokenize=False) == "1+2="
        assert GenerationConfig.from_pretrained(exported).eos_token_id == [2, 19]
        assert greedy(made["path"], PROMPTS) == generated(model, PROMPTS), case


def test_families(trained, export, tmp_path):
    check(FEW, 1, trained, export, tmp_path)


@pytest.mark.soak
def test_all_families_tied_and_untied(trained, export, tmp_path):
    check(MATRIX, 3, trained, export, tmp_path)
