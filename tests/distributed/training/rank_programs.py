"""Programs that the tests run on every rank, inside an initialised process group."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from rlinf_lite.algorithms import LossInputs, LossOutputs, build_algorithm
from rlinf_lite.checkpoint import Checkpointer, flatten, state_digest
from rlinf_lite.checkpoint.state import take
from rlinf_lite.config import Config
from rlinf_lite.models import shard as sharding
from rlinf_lite.node.exchange import NodeExchange
from rlinf_lite.selfcheck.records import UpdateCheck
from rlinf_lite.selfcheck.update import check_update, update_operations
from rlinf_lite.ties import tied_names
from rlinf_lite.training import lr
from rlinf_lite.training.batch import SplitSettings, StepBatch, StepRows
from rlinf_lite.training.fsdp.build import build_critic, build_policy, build_reference
from rlinf_lite.training.fsdp.norm import gradient_norm
from rlinf_lite.training.fsdp.trainer import FsdpTrainer
from rlinf_lite.training.full_weights import full_weights_file
from rlinf_lite.training.ranks import shard, shard_mini_batch
from rlinf_lite.training.update import UpdateReport, update
from rlinf_lite.types import Column, Group

_ONE_GROUP = sharding.SMALL_BYTES
sharding.SMALL_BYTES = 0  # as in a large model, blocks are groups of their own, and compute activations again


class Trained:
    """What a worker holds: a policy, the reference, the loss; and how many updates the run has."""

    def __init__(self, mesh: DeviceMesh, model_dir: str, config: Config, total_updates: int = 100) -> None:
        given = {"model_dir": Path(model_dir), "mesh": mesh, "device": torch.device("cpu")}
        self.trainer: FsdpTrainer = build_policy(config.actor, config.algorithm, **given)
        self.reference = build_reference(config.actor, config.algorithm, **given)
        self.loss = build_algorithm(config.algorithm).losses().policy
        self.config, self.total_updates = config, total_updates
        self.virtual_ranks = config.actor.fsdp_config.virtual_ranks
        self.rank, self.world_size = mesh.get_local_rank(), mesh.size()

    def batch(self, groups: list[Group], number: int, left_out: Collection[int] = ()) -> StepBatch:
        counted = [row not in left_out for row in range(sum(len(group.responses) for group in groups))]
        settings = SplitSettings.of(self.config.algorithm, self.config.runner, seed=self.config.actor.seed)
        return StepBatch(StepRows(groups, step=number, settings=settings), counted)

    def logprobs(self, batch: StepBatch, *, reference: bool) -> dict[int, Tensor]:
        """Of this rank's units."""
        model = self.reference if reference else self.trainer
        return model.forward(shard(batch.for_forward(), self.world_size)[self.rank])

    def step(
        self, groups: list[Group], advantages: Tensor, number: int, left_out: Collection[int] = ()
    ) -> list[UpdateReport]:
        """A step as the runner makes it: old and reference log-probs, then the updates; returns this rank's reports."""
        batch, config = self.batch(groups, number, left_out), self.config
        columns = {Column.ADVANTAGE: advantages.repeat_interleave(torch.from_numpy(batch.num_tokens_N))}
        if config.rollout.return_logprobs:
            columns[Column.ENGINE_LOGPROB] = batch.engine_logprobs()
        if config.algorithm.n_minibatches > 1:
            columns[Column.OLD_LOGPROB] = joined(self.logprobs(batch, reference=False))
        if config.algorithm.kl_beta:
            columns[Column.REF_LOGPROB] = joined(self.logprobs(batch, reference=True))
        reports = []
        for mini_batch in batch.for_update(columns, batch.num_tokens_N > 0):
            rate = lr.learning_rate(config.actor.optim, int(self.trainer.num_updates), self.total_updates)
            mine = shard_mini_batch(mini_batch, self.world_size, virtual_ranks=self.virtual_ranks)[self.rank]
            reports.append(update(self.trainer, mine, self.loss, rate))
        self.trainer.check_finite()
        return reports


def joined(mine: dict[int, Tensor]) -> Tensor:
    found = gathered(mine)
    return torch.cat([found[index] for index in sorted(found)])


def gathered(mine: dict[int, Any]) -> dict[int, Any]:
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, mine)
    return {index: value for part in parts for index, value in part.items()}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def snapshot(trainer: FsdpTrainer) -> dict[str, Any]:
    """Everything that training changes, put together from all ranks."""
    state = take(trainer.state())
    return {
        "model": {name: whole(tensor) for name, tensor in state["model"].items()},
        "optim": {
            name: {key: whole(value) for key, value in moments.items()} for name, moments in state["optim"].items()
        },
        "num_updates": int(state["lr_scheduler"]["num_updates"]),
        "grad_scaler": state.get("grad_scaler"),
    }


def train(
    mesh: DeviceMesh,
    *,
    model_dir: str,
    config: Config,
    groups: list[Group],
    advantages: Tensor,
    num_steps: int = 1,
    left_out: Collection[int] = (),
) -> dict[str, Any]:
    trained = Trained(mesh, model_dir, config)
    reports = [
        report for number in range(1, num_steps + 1) for report in trained.step(groups, advantages, number, left_out)
    ]
    trainer = trained.trainer
    return {
        **snapshot(trainer),
        "reports": reports,
        "tied": tied_names(trainer.model),
        "local_rows": {name: (start, len(rows)) for name, start, rows in trainer.weights(torch.float32)},
        "dtypes": {tensor.dtype for tensor in trainer.model.parameters()},
    }


def logprobs(
    mesh: DeviceMesh,
    *,
    model_dir: str,
    config: Config,
    groups: list[Group],
    reference: bool,
    left_out: Collection[int] = (),
) -> dict[str, Any]:
    trained = Trained(mesh, model_dir, config)
    mine = trained.logprobs(trained.batch(groups, 1, left_out), reference=reference)
    return {
        "mine": mine,
        "whole": joined(mine),
        "training": trained.trainer.model.training,
        "has_reference": trained.reference is not None,
    }


def gradients(
    mesh: DeviceMesh,
    *,
    model_dirs: dict[str, str],
    configs: dict[str, Config],
    groups: list[Group],
    columns: dict[Column, Tensor],
    left_out: Collection[int],
) -> dict[str, list[dict[str, Any]]]:
    """Gradients of each config's losses on one mini-batch, of the policy, and then of the critic, if it has a loss."""
    first, device = next(iter(configs.values())), torch.device("cpu")
    policy = Trained(mesh, model_dirs["policy"], first)
    critic = build_critic(first.critic, model_dir=Path(model_dirs["critic"]), mesh=mesh, device=device, seed=1)
    batch = policy.batch(groups, 1, left_out)
    (mini_batch,) = batch.for_update(columns, batch.num_tokens_N > 0)
    mine = shard_mini_batch(mini_batch, mesh.size(), virtual_ranks=policy.virtual_ranks)[mesh.get_local_rank()]
    found: dict[str, list[dict[str, Any]]] = {}
    for name, config in configs.items():
        losses = build_algorithm(config.algorithm).losses()
        found[name] = []
        for trainer, loss in ((policy.trainer, losses.policy), (critic, losses.critic)):
            if loss is not None:
                units = trainer.forward_backward(mine, loss)
                params = {key: whole(param.grad) for key, param in trainer.model.named_parameters()}
                found[name].append({"params": params, "units": units})
                trainer.optimizer.zero_grad()
    return found


def published(
    mesh: DeviceMesh, *, dtype: torch.dtype, groups: list[Group], advantages: Tensor, one_group: bool, **given: Any
) -> dict[str, Any]:
    """Both forms in which the trainer gives out its weights, after a step and a pass that no update follows."""
    sharding.SMALL_BYTES = _ONE_GROUP if one_group else 0
    trained, sharding.SMALL_BYTES = Trained(mesh, **given), 0
    trained.step(groups, advantages, 1)
    trained.logprobs(trained.batch(groups, 2), reference=False)
    trainer = trained.trainer
    return {"local": list(trainer.weights(dtype)), "whole": list(trainer.whole_weights(dtype)), **snapshot(trainer)}


def train_with_failures(
    mesh: DeviceMesh,
    *,
    model_dir: str,
    config: Config,
    groups: list[Group],
    advantages_of_steps: list[Tensor],
    total_updates: int = 100,
) -> list[dict[str, Any]]:
    """Steps of which some may not be finite: the error's message or the report of each, and the state after it."""
    trained = Trained(mesh, model_dir, config, total_updates)
    seen: list[dict[str, Any]] = [snapshot(trained.trainer)]
    for number, advantages in enumerate(advantages_of_steps, 1):
        outcome: dict[str, Any] = {}
        try:
            outcome["report"] = trained.step(groups, advantages, number)[0]
        except FloatingPointError as error:
            outcome["error"] = str(error)
        seen.append({**snapshot(trained.trainer), **outcome})
    return seen


def train_and_save(
    mesh: DeviceMesh,
    *,
    model_dir: str,
    config: Config,
    groups: list[Group],
    advantages: Tensor,
    root: str,
    steps: range,
    save_after: int | None = None,
    load: str | None = None,
    draw: int = 0,
) -> dict[str, Any]:
    """The steps ``steps``, from a checkpoint if one is given, after ``draw`` random numbers."""
    trained = Trained(mesh, model_dir, config, total_updates=8)
    trainer = trained.trainer
    checkpointer = Checkpointer(Path(root), seed=1)
    if load is not None:
        torch.rand(7)  # restored RNG state does not depend on it
        checkpointer.load(Path(load), trainer.state())
    torch.rand(draw)
    reports, path = [], None
    for number in steps:
        reports += trained.step(groups, advantages, number)
        if number == save_after:
            full = full_weights_file(trainer, torch.float32, keep=mesh.get_local_rank() == 0)
            path = str(checkpointer.save(number, trainer.state(), extra=full).path)
    digest = state_digest(flatten(trainer.state()))
    return {**snapshot(trainer), "reports": reports, "path": path, "random": torch.rand(4), "digest": digest}


def train_on_a_nan(
    mesh: DeviceMesh, *, model_dir: str, config: Config, groups: list[Group], advantages: Tensor, broken: str
) -> tuple[str | None, str | None, str | None]:
    """Two steps; before the second, rank 1 finds a NaN in one tensor of its shard: ``weight`` or a moment's name.

    Returns what `bad_state` said before it, the second step's error, and what `bad_state` says then.
    """
    trained = Trained(mesh, model_dir, config)
    trainer = trained.trainer
    trained.step(groups, advantages, 1)
    before, error = trainer.bad_state(), None
    if mesh.get_local_rank() == 1:
        param = list(trainer.model.parameters())[-1]
        tensor = param.detach() if broken == "weight" else trainer.optimizer.state[param][broken]
        tensor.to_local().view(-1)[0] = torch.nan
    try:
        trained.step(groups, advantages, 2)
    except FloatingPointError as raised:
        error = str(raised)
    return before, error, trainer.bad_state()


def train_and_check(
    mesh: DeviceMesh, *, model_dir: str, config: Config, groups: list[Group], advantages: Tensor, checks: bool
) -> dict[str, Any]:
    """Two steps; with ``checks`` a self-check before each, and every operation twice before the second."""
    trained = Trained(mesh, model_dir, config)
    reports, found = [], []
    for number in (1, 2):
        if checks:
            found.append(check_update(trained.trainer, trained.loss, groups))
            assert all(param.grad is None for param in trained.trainer.model.parameters())
        if checks and number == 2:
            twice = update_operations(trained.trainer, trained.loss, groups)
            assert twice.first is None and twice.seen.total() > 100, twice.differ
        reports += trained.step(groups, advantages, number)
    return {**snapshot(trained.trainer), "reports": reports, "checks": found, "random": torch.rand(4)}


_counter = itertools.count(1)


@torch.library.custom_op("rlinf_lite_test::noisy", mutates_args=(), schema="(Tensor x) -> Tensor")
def _noisy(x):
    return x * (1.0 + 1e-3 * next(_counter))


class _NoisyBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _noisy(grad)


def check_with_noise(
    mesh: DeviceMesh, *, model_dir: str, config: Config, groups: list[Group], advantages: Tensor, noisy_rank: int
) -> tuple[UpdateCheck, str | None]:
    """A self-check with an operation in one rank's backward pass that never repeats; and the name that is found."""
    trained = Trained(mesh, model_dir, config)
    if mesh.get_local_rank() == noisy_rank:
        embeddings = trained.trainer.model.get_input_embeddings()
        embeddings.register_forward_hook(lambda module, inputs, output: _NoisyBackward.apply(output))
    check = check_update(trained.trainer, trained.loss, groups)
    return check, update_operations(trained.trainer, trained.loss, groups).first


def digests(
    mesh: DeviceMesh,
    *,
    cases: dict[str, tuple[str, Config]],
    groups: list[Group],
    advantages: Tensor,
    num_steps: int,
) -> dict[str, list[tuple[str, list[float]]]]:
    """Per case, model directory and config, and per step: the state's sha256, and the gradient norms."""
    found: dict[str, list[tuple[str, list[float]]]] = {}
    for name, (model_dir, config) in cases.items():
        sharding.SMALL_BYTES = _ONE_GROUP if "one group" in name else 0
        trained, found[name] = Trained(mesh, model_dir, config, total_updates=8), []
        assert (trained.trainer.sharded.exchange is None) == ("one group" not in name or mesh.size() == 1), name
        for number in range(1, num_steps + 1):
            reports = trained.step(groups, advantages, number)
            digest = state_digest(flatten(trained.trainer.state()))
            found[name].append((digest, [report.grad_norm for report in reports]))
    sharding.SMALL_BYTES = 0
    return found


class _Fails(Exception):
    pass


def train_after_an_abandoned_step(
    mesh: DeviceMesh, *, model_dir: str, config: Config, groups: list[Group], advantages: Tensor, fails_at: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state after a step, and after the same one that follows an abandoned one.

    That ends when the loss of this rank's ``fails_at``-th unit fails.
    """
    undisturbed, trained = (Trained(mesh, model_dir, config) for _ in range(2))
    undisturbed.step(groups, advantages, 1)
    whole_loss, units = trained.loss, itertools.count(1)

    class FailingLoss:
        wants_entropy = whole_loss.wants_entropy

        def __call__(self, inputs: LossInputs) -> LossOutputs:
            if next(units) == fails_at:
                raise _Fails
            return whole_loss(inputs)

    trained.loss = FailingLoss()
    try:
        trained.step(groups, advantages, 1)
    except _Fails:
        trained.loss = whole_loss
    else:
        raise AssertionError(f"this rank has fewer than {fails_at} units")
    trained.step(groups, advantages, 1)
    return snapshot(undisturbed.trainer), snapshot(trained.trainer)


def norms(mesh: DeviceMesh) -> dict[str, float]:
    """The norm of several gradients, whose elements are spread over the ranks; and of some as it must be."""
    rank, size = mesh.get_local_rank(), mesh.size()
    draw = torch.Generator().manual_seed(2)
    plain = torch.randn(200_003, generator=draw) * 10 ** torch.randint(-9, 3, (200_003,), generator=draw)
    coarse = plain.bfloat16()
    exchange = NodeExchange.open(mesh.get_group(), 4096, 60.0) if size > 1 else None

    def norm(whole_gradient: Tensor) -> float:
        mine = whole_gradient[len(whole_gradient) * rank // size : len(whole_gradient) * (rank + 1) // size]
        shards = [mine[:7], mine[7:307].view(3, 100), mine[:0], mine[307:]]
        found = [gradient_norm(shards, mesh.get_group(), way) for way in (None, exchange)]
        assert repr(found[0]) == repr(found[1])
        return found[0]

    def exact(whole_gradient: Tensor) -> float:
        return math.sqrt(math.fsum(x * x for x in whole_gradient.double().tolist()))

    return {
        "plain": norm(plain),
        "expected": exact(plain),
        "tiny": norm(plain * 2.0**-120),
        "huge": norm(torch.cat([plain[:-1], torch.tensor([1e30])])),
        "bf16": norm(coarse),
        "bf16 expected": exact(coarse),
        "zeros": norm(torch.zeros(10_000)),
        "nan": norm(torch.cat([torch.ones(9_999), torch.tensor([torch.nan])])),
        "inf": norm(torch.cat([torch.tensor([-torch.inf]), torch.ones(9_999)])),
    }
