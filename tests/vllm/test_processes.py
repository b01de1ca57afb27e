"""Engines in separate processes: bitwise identical results, tensor parallelism, no process left of a killed one."""

from __future__ import annotations

import time
from importlib.util import find_spec

import psutil
import pytest
from engine_process import bits, load_model, make_batch, pieces, sums

if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: bash toolkits/vllm/install_cpu.sh", allow_module_level=True)
pytestmark = pytest.mark.timeout(900)
ONE = {"prompts": sums("57+38=", "12+31="), "group_size": 8}
OTHER = {"prompts": sums("99+99=", "45+23=", "10+10="), "first": 20, "group_size": 6, "max_new_tokens": 12}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_another_process_gives_the_same_bits(precision, processes):
    """Tokens and log-probs, in whatever order the batches arrive."""
    engine = {"precision": precision}
    first, second = processes.run(engine=engine, batches=[ONE, OTHER])
    assert processes.run(engine=engine, batches=[OTHER, ONE]) == [second, first]


def test_a_cache_that_is_too_small_for_all_at_once(processes):
    """A fixed size: which requests wait, and what is recomputed, is the same each time."""
    many = {**OTHER, "group_size": 20, "max_new_tokens": 50}
    engine = {"kv_cache_gb": 0.0003}  # 18 blocks of 32 tokens, 512 bytes each, for 60 rows of at least one block
    first, second = processes.run(engine=engine, batches=[many, ONE])
    assert processes.run(engine=engine, batches=[ONE, many]) == [second, first]
    assert len(first) == 60


def test_two_tensor_parallel_ranks(engine, processes):
    """Sums over two ranks round differently, so log-probs differ in their last bits, but greedy tokens do not.
    Weights, tied ones too, reach both."""
    greedy = {**ONE, "do_sample": False}
    job = {"engine": {"tensor_parallel_size": 2}, "model": {"seed": 2}}
    made = processes.run(**job, batches=[greedy, OTHER])
    assert processes.run(**job, batches=[OTHER, greedy]) == made[::-1]
    engine.load_weights(pieces(load_model(seed=2)))
    assert [row[2] for row in made[0]] == [row[2] for row in bits(engine.generate(make_batch(**greedy)))]


def test_nothing_outlives_an_engine_that_is_killed(processes):
    process, output = processes.start(engine={"tensor_parallel_size": 2}, batches=[ONE], wait_for_signal=True)
    while not output.exists():
        assert process.poll() is None, processes.log
        time.sleep(0.2)
    children = psutil.Process(process.pid).children(recursive=True)
    assert (
        len([child for child in children if "Worker" in child.name() or "spawn_main" in " ".join(child.cmdline())]) >= 2
    )
    process.kill()
    _, left = psutil.wait_procs(children, timeout=30)
    assert not left
