"""Every algorithm keeps the promise: killed and resumed, a run ends in the bits of the run that was never killed."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(900)  # two whole runs a test

MISMATCH = {
    "rollout.return_logprobs": "true",
    "algorithm.importance_sampling_fix": "true",
    "algorithm.importance_sampling_mode": "sequence-mask",
}
MORE = {
    "ppo": {"algorithm.gae_lambda": "0.95", "algorithm.n_minibatches": "2", "algorithm.critic_warmup_steps": "1"},
    "dapo": {"algorithm.overlong_buffer": "2"},
    "grpo": {"algorithm.kl_beta": "0.05", **MISMATCH},
    "reinpp": {
        "algorithm.kl_beta": "0.01",
        "algorithm.kl_in_reward": "true",
        "algorithm.kl_penalty_type": "kl",
    },
}
"""Settings beside those of the table in docs/algorithms.md, so that each part of the code is in one of the runs."""
_TABLE = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "algorithms.py"))["ALGORITHMS"]
ALGORITHMS = {name: {**settings, **MORE.get(name, {})} for name, settings in _TABLE.items()}
BY_DEFAULT = ("ppo",)
ACTORS = "cluster.component_placement.actor"
STEPS = 6
PLACES = {"2 ranks": ("0-1", "0"), "1 rank": ("0", "0-2")}
"""Slots of the ranks that end the killed run, and of those that the kill ends. The other run has one rank."""
TWO_ROLLOUTS = {"cluster.component_placement.rollout": "0-1"}


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        pytest.param(name, ranks, marks=[] if name in BY_DEFAULT and ranks == "2 ranks" else pytest.mark.soak)
        for name in ALGORITHMS
        for ranks in PLACES
    ],
)
def test_killed_and_resumed_it_ends_in_the_same_bits(name, ranks, new_run, same_run, tmp_path):
    """Against one rank and one rollout worker, never killed: two rollout workers, and another number of ranks after a
    kill than before.
    With PPO a critic rank is killed then, too, while all others wait for it in a save.
    """
    slots, slots_at_first = PLACES[ranks]
    given = {**ALGORITHMS[name], ACTORS: slots, "runner.max_steps": str(STEPS)}
    straight, killed = new_run({**given, ACTORS: "0"}), new_run({**given, **TWO_ROLLOUTS})
    straight.finish()
    no_more = {"phase": "save.manifest", "step": 3, "action": "hang"}
    killed.kill_when(f"step    3/{STEPS}", f"{ACTORS}={slots_at_first}", faults=[no_more])
    assert killed.steps() == [1, 2]
    last_rank = int(ranks == "2 ranks")
    faults = [
        {"phase": "save.plan", "step": 3, "rank": 2 * last_rank + 1, "action": "hang"},  # ranks of policy and critic
        {"phase": "critic.update", "step": 4, "rank": last_rank, "action": "kill"},
    ]
    for number, fault in enumerate(faults):
        fault["armed"] = str(tmp_path / f"armed{number}")
        Path(fault["armed"]).touch()
    printed = killed.finish("runner.resume_dir=auto", faults=faults if name == "ppo" else [])
    assert "the numbers stay bit-equal" in printed
    same_run(straight, killed, STEPS, same_ranks=False)
    if name == "ppo":
        assert not any(Path(fault["armed"]).exists() for fault in faults), "one did not strike"
        assert_no_step_was_lost(printed, last_rank)
        assert "loss/policy" not in straight.rows()[0] and "loss/value" in straight.rows()[0], "critic warm-up"
        assert "loss/policy" in straight.rows()[1]
    if name == "dapo":
        assert sum(row["sampling/dropped_groups"] for row in straight.rows()) > 0
        assert max(row["sampling/groups"] for row in straight.rows()) > 8


def assert_no_step_was_lost(printed, rank):
    """A critic rank was killed in step 4: the run continues in that step, from the replicas in memory."""
    assert printed.count(f"CriticGroup rank {rank} was lost") == 1
    assert printed.count("the state of step 3 was in memory") == 1
    steps = [int(line.split()[1].split("/")[0]) for line in printed.splitlines() if line.startswith("step ")]
    assert steps == [3, 4, 5, 6], "each step once"
