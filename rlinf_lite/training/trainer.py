"""`PolicyTrainer`: one rank of the sharded policy. Log-probs, updates, weights to publish, state to save.

It uses torch.distributed, but neither Ray nor checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rlinf_lite.algorithms import token_logprobs
from rlinf_lite.config import ActorConfig, AlgorithmConfig
from rlinf_lite.errors import NotFinite
from rlinf_lite.models import build, hf_directory, shard
from rlinf_lite.training.lr import learning_rate
from rlinf_lite.training.objective import MicroSums, micro_batch_loss
from rlinf_lite.training.state import MOMENTS, GradScalerState, build_optimizer, first_non_finite, optimizer_state
from rlinf_lite.types import MicroBatch, RankBatch
from rlinf_lite.weights.hf import HfWeights
from rlinf_lite.weights.live import LiveWeights, fill, local_pieces
from rlinf_lite.weights.names import WeightNames, named_weights
from rlinf_lite.weights.pieces import WeightPiece
from rlinf_lite.weights.source import whole_pieces


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateReport:
    """Result of one optimizer step on one rank."""

    sums: dict[int, MicroSums]
    """By `MicroBatch.index`: the driver adds them in that order, whichever rank they come from."""
    grad_norm: float
    """Global L2 norm before clipping; not finite after an overflow, 0 without loss tokens."""
    lr: float
    skipped: bool
    """No optimizer step was taken: the gradients overflowed with a scaler, or the mini-batch has no loss tokens."""


class PolicyTrainer:
    """The policy, its optimizer and, with a KL term, the frozen reference model."""

    def __init__(
        self,
        actor: ActorConfig,
        algorithm: AlgorithmConfig,
        *,
        model_dir: Path,
        mesh: DeviceMesh,
        device: torch.device,
        total_updates: int,
    ) -> None:
        """Build the model on the meta device, shard it, fill it.

        Args:
            model_dir: Hugging Face directory with the base weights.
            mesh: one-dimensional, over the data-parallel ranks.
            total_updates: optimizer steps of the whole run, over which the learning rate decays.
        """
        self.actor, self.algorithm, self.device, self.mesh = actor, algorithm, device, mesh
        self.rank, self.world_size = mesh.get_local_rank(), mesh.size()
        self.total_updates = total_updates
        self.temperature = algorithm.sampling_params.temperature if algorithm.sampling_params.do_sample else 1.0
        self.model = self._build(model_dir)
        self.model.train()
        if actor.fsdp_config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.reference = self._build(model_dir).eval().requires_grad_(False) if algorithm.kl_beta else None
        optim = actor.optim
        self.optimizer = build_optimizer(
            list(self.model.parameters()),
            lr=optim.lr,
            betas=(optim.adam_beta1, optim.adam_beta2),
            eps=optim.adam_eps,
            weight_decay=optim.weight_decay,
        )
        # Includes skipped steps: the learning rate follows the run's progress, and ends with the run.
        self.num_updates = torch.zeros((), dtype=torch.int64)
        self.scaler = self._build_scaler()

    def _build(self, model_dir: Path) -> PreTrainedModel:
        config = hf_directory.load_config(model_dir, self.actor.model.model_type)
        if not self.actor.model.dropout:
            build.disable_dropout(config)
        model = build.build_on_meta(config, self.actor.model.precision)
        shard.shard(model, self.mesh, self.actor.fsdp_config)
        offloaded = self.actor.fsdp_config.cpu_offload
        build.materialize(model, torch.device("cpu") if offloaded else self.device)
        fill(model, HfWeights(model_dir, WeightNames.of(model)))
        if offloaded:  # parameters stay on the CPU, buffers are used on the device
            for module in model.modules():
                for name, buffer in module._buffers.items():
                    module._buffers[name] = None if buffer is None else buffer.to(self.device)
        return model

    def _build_scaler(self) -> GradScaler:
        config = self.actor.fsdp_config.grad_scaler
        return GradScaler(
            self.device.type,
            init_scale=config.init_scale,
            growth_factor=config.growth_factor,
            backoff_factor=config.backoff_factor,
            growth_interval=config.growth_interval,
            enabled=config.enabled,
        )

    # -- state and weights

    def state(self) -> dict[str, Any]:
        """Everything that training changes: live tensors (sharded ones as DTensors) and `Stateful` objects."""
        state: dict[str, Any] = {
            "model": dict(named_weights(self.model)),
            "optim": optimizer_state(self.model, self.optimizer),
            "lr_scheduler": {"num_updates": self.num_updates},
        }
        if self.scaler.is_enabled():
            state["grad_scaler"] = GradScalerState(self.scaler)
        return state

    def non_finite(self, *, weights_only: bool = False) -> str | None:
        """Name of a tensor of parameters or optimizer state with a NaN or an infinity in this rank's shard, or None."""
        tensors = {f"model.{name}": param.detach() for name, param in self.model.named_parameters()}
        if not weights_only:
            for name, adam in optimizer_state(self.model, self.optimizer).items():
                tensors |= {f"optim.{name}.{moment}": adam[moment] for moment in MOMENTS}
        return first_non_finite(tensors)

    def bad_state(self) -> str | None:
        """Why this rank's state cannot come from training, for a check after a load; None if it can."""
        if (name := self.non_finite()) is not None:
            return f"{name} holds a NaN or an infinity"
        if self.num_updates < 0:
            return f"lr_scheduler.num_updates is {int(self.num_updates)}"
        for name, adam in optimizer_state(self.model, self.optimizer).items():
            steps = adam["step"].item()
            if not 0 <= steps <= int(self.num_updates) or steps != int(steps):
                return f"optim.{name}.step is {steps} after {int(self.num_updates)} optimizer steps"
        if self.scaler.is_enabled() and not 0 < self.scaler.get_scale() < float("inf"):
            return f"grad_scaler.scale is {self.scaler.get_scale()}"
        return None

    def local_weights(self, dtype: torch.dtype) -> Iterator[WeightPiece]:
        """This rank's rows of every weight, see `local_pieces`."""
        return local_pieces(self.model, dtype)

    def whole_weights(self, dtype: torch.dtype) -> Iterator[WeightPiece]:
        """Every weight whole, one at a time, cast to ``dtype``. Collective: every rank must exhaust it."""
        return whole_pieces(LiveWeights(self.model, self.device), dtype)

    # -- log-probs

    @torch.no_grad()
    def logprobs(self, micro_batches: Sequence[MicroBatch | None], *, reference: bool = False) -> dict[int, Tensor]:
        """Compute log-probs of this rank's micro-batches. Collective.

        Args:
            micro_batches: as `ranks.shard` assigns them; for None the rank only takes part in the collectives.

        Returns:
            ``{MicroBatch.index: float32 [B, T-1] in CPU memory}``.
        """
        model = self.reference if reference else self.model
        assert model is not None
        training = model.training
        model.eval()
        found = {}
        for micro in micro_batches:
            if micro is None:
                self._idle(model)
                continue
            logits, targets, lead = self._logits(model, micro)
            found[micro.index] = _pad_left(token_logprobs(logits, targets, self.temperature), lead).cpu()
        model.train(training)
        return found

    # -- update

    def update(self, batch: RankBatch) -> UpdateReport:
        """Take one optimizer step on this rank's micro-batches. Collective.

        Without any loss token no step is taken, on any rank: it would move the weights by weight decay and by the
        momentum of earlier steps alone. The learning rate moves on as usual.

        Raises:
            NotFinite: the gradient is not finite, and there is no gradient scaler to skip the step.
        """
        lr = learning_rate(self.actor.optim, int(self.num_updates), self.total_updates)
        self.optimizer.param_groups[0]["lr"] = lr
        if not batch.num_tokens:
            self._count_update()
            return UpdateReport(sums={}, grad_norm=0.0, lr=lr, skipped=True)
        self.optimizer.zero_grad()
        sums = {}
        for micro in batch.micro_batches:
            loss, micro_sums = self._loss(micro, batch)
            self.scaler.scale(loss).backward()
            if micro is not None:
                sums[micro.index] = micro_sums
        return self._step(sums, lr)

    def _step(self, sums: dict[int, MicroSums], lr: float) -> UpdateReport:
        self.scaler.unscale_(self.optimizer)
        clip = self.actor.optim.clip_grad or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        finite = bool(torch.isfinite(norm))
        if not finite and not self.scaler.is_enabled():
            raise NotFinite(
                f"the gradient norm is {norm.item()} after {int(self.num_updates)} optimizer steps; nothing was "
                "updated. Lower actor.optim.lr, or compute in fp32 (actor.model.precision, "
                "actor.fsdp_config.mixed_precision)"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._count_update()
        return UpdateReport(sums=sums, grad_norm=norm.item(), lr=lr, skipped=not finite)

    def check_finite(self) -> None:
        """Check parameters and optimizer state after a step's last mini-batch, before saving. Not collective.

        A NaN or an infinity stays in them, whichever mini-batch caused it.

        Raises:
            NotFinite: names the tensor in this rank's shard that holds one.
        """
        if (name := self.non_finite()) is not None:
            raise NotFinite(
                f"{name} holds a NaN or an infinity after {int(self.num_updates)} optimizer steps (rank {self.rank}). "
                "This state is neither saved nor replicated: the newest checkpoint is of an earlier step. Lower "
                "actor.optim.lr, set actor.optim.clip_grad, or compute in fp32 (actor.model.precision, "
                "actor.fsdp_config.mixed_precision)"
            )

    def _count_update(self) -> None:
        # Not in place: without an optimizer step nothing waits for a save that may still be reading the tensor.
        self.num_updates = self.num_updates + 1

    def _loss(self, micro: MicroBatch | None, batch: RankBatch) -> tuple[Tensor, MicroSums]:
        """What the micro-batch adds to the mini-batch loss (summed over micro-batches and ranks), and its sums."""
        if micro is None:
            return self._idle(self.model), {}
        logits, targets, lead = self._logits(self.model, micro)
        return micro_batch_loss(logits, targets, lead, micro, batch, self.algorithm, self.temperature)

    # -- forward

    def _logits(self, model: PreTrainedModel, micro: MicroBatch) -> tuple[Tensor, Tensor, int]:
        """Logits [B, C, V], targets [B, C], and the number of leading columns (prompt in all rows) without logits."""
        ids = micro.input_ids_BT.to(self.device)
        lead = micro.min_prompt_len - 1
        # Right padding under a causal mask: no token attends to padding, so no attention mask is needed.
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - lead).logits
        return logits[:, :-1], ids[:, lead + 1 :], lead

    def _idle(self, model: PreTrainedModel) -> Tensor:
        """Take part in the collectives of a forward (and backward) pass without changing a sum."""
        logits = model(input_ids=torch.zeros((1, 2), dtype=torch.int64, device=self.device), use_cache=False).logits
        return logits.float().mean() * 0.0


def _pad_left(values: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(values, (columns, 0))
