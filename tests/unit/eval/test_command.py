"""Whole evaluations: the numbers of the run's own validation, rows that survive an interruption, and errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

from rlinf_lite.config import build
from rlinf_lite.data import load_problems
from rlinf_lite.eval import command as commands
from rlinf_lite.export import dcp_to_megatron
from rlinf_lite.export.checkpoint_path import located
from rlinf_lite.models import hf_directory, vocabulary
from rlinf_lite.models.hf_directory import resolve
from rlinf_lite.rewards import build_grader, generated, grading_items
from rlinf_lite.rollout.batches import generation_batches, join
from rlinf_lite.rollout.builtin import BuiltinEngine
from rlinf_lite.types import Prompt, Sampling

EMBEDDED = "embedded:tiny-arithmetic"


@pytest.fixture
def validated(settings, trained_model):
    """The responses and scores of a run's validation after ``step``, computed step by step."""

    def run(step: int, **sampling):
        config = build(settings)
        model_dir = hf_directory.resolve(EMBEDDED)
        tokenizer = hf_directory.load_tokenizer(model_dir)
        engine = BuiltinEngine(
            trained_model(seed=step),
            tokenizer,
            eos_ids=vocabulary.eos_ids(model_dir, tokenizer),
            return_logprobs=False,
            max_rows=5,
        )
        prompts = [
            Prompt(prompt_index=p.problem_id, epoch=0, problem=p)
            for p in load_problems(config.data, "val", tokenizer).problems
        ]
        made = []
        for first in range(0, len(prompts), 8):
            for batch in generation_batches(
                prompts[first : first + 8],
                stream="val",
                step=step,
                group_size=1,
                sampling=Sampling(**{**vars(config.algorithm.val_sampling_params), **sampling}),
                seed=77,
                max_rows=5,
            ):
                made += engine.generate(batch)
        pairs = generated(join([made]))
        scores = build_grader(config.reward).score(grading_items(pairs))
        return [response for _, response in pairs], scores

    return run


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("flags", [[], ["--temperature", "1.3"]], ids=["greedy", "sampled"])
def test_the_numbers_equal_those_of_the_runs_validation(make_run, validated, results, tmp_path, flags):
    run, file = make_run([2, 4]), tmp_path / "rows.jsonl"
    responses, scores = validated(4, **({"do_sample": True, "temperature": 1.3} if flags else {}))
    found = results(run, *flags, "--output", file)
    assert found["accuracy"] == sum(score.correct for score in scores) / 20
    assert 0 < found["accuracy"] < 1
    assert (found["step"], found["num_problems"], found["num_samples"]) == (4, 20, 1)
    for row, expected, score in zip(rows_of(file), responses, scores, strict=True):
        (response,) = row["responses"]
        assert (response["text"], response["correct"], response["finished"], response["num_tokens"]) == (
            expected.text,
            score.correct,
            expected.finished,
            len(expected.token_ids),
        )


def test_an_export_has_the_results_of_its_checkpoint(make_run, exported, results):
    run = make_run([4])
    of_run, of_export = results(run), results(exported, "--config", run)
    same = of_run.keys() - {"model", "step"}
    assert {key: of_run[key] for key in same} == {key: of_export[key] for key in same}


def test_a_checkpoint_in_megatrons_layout(make_run, results, tmp_path):
    run = make_run([4])
    with located(run / "checkpoints/global_step_4") as source:
        dcp_to_megatron.convert(source, tmp_path / "other/checkpoints", base=resolve(EMBEDDED), tensor_parallel=2)
    shutil.copyfile(run / "config.yaml", tmp_path / "other/config.yaml")
    found, same = results(run), results(tmp_path / "other")
    del found["model"], same["model"]
    assert same == found


def test_samples(make_run, results, tmp_path):
    file = tmp_path / "rows.jsonl"
    found = results(make_run([4]), "--num-samples", 6, "--output", file)
    rows = rows_of(file)
    assert [row["problem_id"] for row in rows] == list(range(20))
    assert all(len(row["responses"]) == 6 for row in rows)
    assert any(len({response["text"] for response in row["responses"]}) > 1 for row in rows)
    correct = [[response["correct"] for response in row["responses"]] for row in rows]
    assert list(found["pass@k"]) == list(found["maj@k"]) == ["1", "2", "4", "6"]
    assert found["pass@k"]["1"] == pytest.approx(found["accuracy"]) == found["maj@k"]["1"]
    assert found["pass@k"]["6"] == sum(map(any, correct)) / 20
    assert found["accuracy"] == sum(map(sum, correct)) / 120
    first = rows[0]
    assert first["prompt"].endswith("=") and first["reference"].isdigit() and first["source"].startswith("arithmetic:")
    assert first["responses"][0].keys() == {"text", "answer", "correct", "reward", "finished", "num_tokens", "error"}


def test_a_response_that_cannot_be_graded_counts_as_wrong(make_run, command, tmp_path):
    """Half of the problems are ungraded and count as wrong; the mean reward is that of the others."""
    (tmp_path / "half.py").write_text(
        "def score(answer):\n    return {'reward': -0.5, 'correct': True} if int(answer) % 2 else None\n"
    )
    run, file = make_run([4]), tmp_path / "rows.jsonl"
    custom = ("reward.reward_type=custom", f"reward.path={tmp_path}/half.py:score")
    code, out, err = command(run, "--output", file, *custom)
    assert code == 0, err
    odd = [int(row["reference"]) % 2 for row in rows_of(file)]
    responses = [row["responses"][0] for row in rows_of(file)]
    assert [(r["correct"], r["reward"]) for r in responses] == [(True, -0.5) if o else (False, None) for o in odd]
    errors = [None if o else "reward.path: the function returned None; return" for o in odd]
    assert [r["error"] and r["error"][: len(e)] for r, e in zip(responses, errors, strict=True)] == errors
    found = json.loads((tmp_path / "rows.jsonl.summary.json").read_text())["results"]
    assert (found["accuracy"], found["reward_mean"], found["ungraded"]) == (sum(odd) / 20, -0.5, 20 - sum(odd))
    assert f"ungraded    {20 - sum(odd)} could not be generated or graded, and count as wrong" in out
    assert "verifier " not in out


def test_several_reward_functions(make_run, settings, results, command, tmp_path):
    """As the run had them: the YAML has the paths, and the manifest what makes the numbers."""
    (tmp_path / "size.py").write_text("def score(response): return len(response) or None\n")
    path, file = f"{tmp_path}/size.py:score", tmp_path / "rows.jsonl"
    functions = [
        {"name": "correct", "reward_type": "exact"},
        {"name": "size", "reward_type": "custom", "path": path, "weight": -0.25},
    ]
    run = make_run([4], {"reward": {"reward_type": "math", "functions": functions}})
    code, out, err = command(run, "--output", file)
    assert code == 0, err
    graded = [row["responses"][0] for row in rows_of(file) if row["responses"][0]["reward"] is not None]
    assert graded and all(each["reward/size"] == len(each["text"]) for each in graded)
    assert all(each["reward"] == each["reward/correct"] - 0.25 * each["reward/size"] for each in graded)
    assert all(each["correct"] == (each["reward/correct"] == 1.0) for each in graded)
    found = json.loads((tmp_path / "rows.jsonl.summary.json").read_text())["results"]
    mean = found["reward/correct"] - 0.25 * found["reward/size"]
    assert found["reward_mean"] == pytest.approx(mean, abs=1e-12)
    assert "reward 1 x correct + -0.25 x size" in out and f"size {found['reward/size']:.4f}" in out
    assert results(run, "reward.functions.1.weight=-0.5")["reward/size"] == found["reward/size"]
    code, _, err = command(run, "--output", file, "reward.functions.1.weight=-0.5")
    assert code == 2 and "reward.functions: [" in err and "holds another evaluation" in err


def test_an_interrupted_evaluation_continues(make_run, command, results, tmp_path, monkeypatch):
    """Ctrl-C in the third batch, then the same command: the file equals that of an uninterrupted evaluation."""
    run, whole, file = make_run([4]), tmp_path / "whole.jsonl", tmp_path / "rows.jsonl"
    uninterrupted = results(run, "--temperature", 1, "--output", whole)
    generate, calls = BuiltinEngine.generate, []

    def interrupted(engine, batch):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(engine, batch)

    with monkeypatch.context() as patch:
        patch.setattr(BuiltinEngine, "generate", interrupted)
        code, _, err = command(run, "--temperature", 1, "--output", file)
        assert (code, len(rows_of(file))) == (130, 8) and "interrupted" in err
        assert json.loads((tmp_path / "rows.jsonl.summary.json").read_text())["results"] is None
    code, _, err = command(run, "--temperature", 1, "--top-p", 0.9, "--output", file)
    assert code == 2 and "algorithm.val_sampling_params.top_p: 1.0 -> 0.9" in err
    assert results(run, "--temperature", 1, "--output", file) == uninterrupted
    assert file.read_bytes() == whole.read_bytes()

    with monkeypatch.context() as patch:  # all rows exist, so no engine is built
        patch.setattr(commands, "build_engine", None)
        code, out, _ = command(run, "--temperature", 1, "--output", file)
    assert code == 0 and "20 were written before" in out and "accuracy" in out


def test_data_from_a_file(exported, results, tmp_path):
    data = tmp_path / "sums.jsonl"
    data.write_text('{"q": "12+30=", "a": "42"}\n{"q": "2+2=", "a": 4}\n{"q": "11111111111+1=", "a": "x"}\n')
    keys = "data.prompt_key=q", "data.answer_key=a"
    found = results(exported, "--data", data, *keys, "data.max_prompt_length=8", "--max-new-tokens", 9)
    assert found["num_problems"] == 2
    found = results(
        exported, keys[1], "data.max_prompt_length=99", "--max-new-tokens", 4, "--data", data, data, keys[0]
    )
    assert (found["num_problems"], found["response_tokens_max"] <= 4) == (6, True)


def test_the_embedded_model_needs_no_options(command):
    code, out, err = command(EMBEDDED, "data.arithmetic.num_val_problems=40")
    assert code == 0, err
    assert "40 from arithmetic; reward exact" in out and "greedy, at most 4 new tokens" in out
    assert "accuracy    0." in out and "of 40 responses" in out
    assert "40/40 problems" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "error: nowhere: no such directory"),
        ([EMBEDDED, "--num-samples", "4", "--temperature", "0"], "error: --num-samples 4: all greedy responses"),
        ([EMBEDDED, "--num-samples", "0"], "error: --num-samples 0: must be at least 1"),
        ([EMBEDDED, "--temperature", "-1"], "temperature=-1.0: must be above 0"),
        ([EMBEDDED, "--data", "gone.jsonl"], "error: data.val_data_paths: no such file or directory: 'gone.jsonl'"),
        ([EMBEDDED, "greedy"], "error: 'greedy': neither an option nor key=value"),
        ([EMBEDDED, "--max-new-tokens", "500"], "data.max_prompt_length=8 and --max-new-tokens 500: the model has"),
        ([EMBEDDED, "--engine", "tgi"], "error: rollout.rollout_backend=tgi: "),
        ([EMBEDDED, "--config", "gone"], "error: --config gone: there is no "),
    ],
)
def test_errors(command, arguments, message):
    code, _, err = command(*arguments)
    assert (code, message in err, "Traceback" in err) == (2, True, False), err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(command):
    assert (
        command(EMBEDDED, "--device", "cuda")[2]
        == "error: cluster.device=cuda: no CUDA device here; give --device cpu\n"
    )


def test_a_checkpoint_of_another_model_is_refused(make_run, exported, command, tmp_path):
    base = tmp_path / "other"
    shutil.copytree(exported, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "intermediate_size": 191}))
    code, _, err = command(make_run([4]), f"actor.model.model_path={base}")
    assert code == 2 and "mlp.gate_proj.weight is [192, 64], the base model's is [191, 64]" in err


def test_help_is_quick():
    code = (
        "import sys\nfrom rlinf_lite.eval import __main__ as command\n"
        "try: command.main(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'ray', 'hydra') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--num-samples" in shown and shown.splitlines()[-1] == "[]"
