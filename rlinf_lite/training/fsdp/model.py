"""Models sharded with FSDP and filled from a Hugging Face directory: what they say of a unit's loss tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PretrainedConfig, PreTrainedModel

from rlinf_lite.config import FsdpConfig, ModelConfig
from rlinf_lite.models import build, hf_directory, shard
from rlinf_lite.models.recompute import recompute_cheap
from rlinf_lite.models.scored import ScoredModel, ValueModel
from rlinf_lite.models.segments import FlatTokens
from rlinf_lite.node.exchange import NodeExchange
from rlinf_lite.training.fsdp.gather import connect
from rlinf_lite.types import TokenBatch
from rlinf_lite.weights.hf import HfWeights
from rlinf_lite.weights.live import fill
from rlinf_lite.weights.names import WeightNames, named_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenOutputs:
    """What a model says of M loss tokens: float32 [M] each, on the model's device."""

    logprob_M: Tensor | None = None
    entropy_M: Tensor | None = None
    value_M: Tensor | None = None

    def leaves(self) -> TokenOutputs:
        """The same values without their history: gradients of a loss stop here, and `backward` sends them on.

        A loss may so be differentiated more than once, while FSDP's hooks, which communicate, see one backward pass.
        """

        def leaf(values_M: Tensor | None) -> Tensor | None:
            return None if values_M is None else values_M.detach().requires_grad_()

        return TokenOutputs(logprob_M=leaf(self.logprob_M), entropy_M=leaf(self.entropy_M), value_M=leaf(self.value_M))

    def backward(self, leaves: TokenOutputs) -> None:
        """Propagate the gradients of ``leaves`` through the model."""
        pairs = [
            (mine, other.grad)
            for mine, other in zip(self._all(), leaves._all(), strict=True)
            if mine is not None and other is not None and other.grad is not None
        ]
        torch.autograd.backward([mine for mine, _ in pairs], [grad for _, grad in pairs])

    def _all(self) -> tuple[Tensor | None, ...]:
        return self.logprob_M, self.entropy_M, self.value_M


class ShardedModel:
    """A model over all ranks of a mesh. Every method is collective over them."""

    model: PreTrainedModel
    """Its parameters have the names that checkpoints and engines know."""
    root: nn.Module
    """What FSDP shards and calls: the model with its head."""
    section: ClassVar[str] = "actor"
    """Of the run's config, for messages."""
    names: WeightNames
    live: dict[str, Tensor]
    """All weights by name: parameters and persistent buffers. With ``strategy: fsdp`` a parameter is a flat slice."""
    params: dict[str, nn.Parameter]
    """The parameters among them."""
    exchange: NodeExchange | None = None
    """How the ranks of a small model reach each other, if all of them are processes of one machine, on a CPU."""

    def __init__(
        self, settings: ModelConfig, fsdp: FsdpConfig, *, model_dir: Path, mesh: DeviceMesh, device: torch.device
    ) -> None:
        """Build the model on the meta device, shard it, fill it.

        Args:
            model_dir: Hugging Face directory with the base weights.
            mesh: one-dimensional, over the data-parallel ranks.
        """
        self.device, self.mesh = device, mesh
        config = hf_directory.load_config(model_dir, settings.model_type, self.section)
        if not settings.dropout:
            build.disable_dropout(config)
        self._build(config, settings.precision)
        self.names = WeightNames.of(self.model)
        if device.type == "cpu" and not fsdp.gradient_checkpointing and not shard.is_small(self.root):
            recompute_cheap(shard.blocks(self.model))
        if fsdp.strategy == "fsdp":
            self._shard_flat(fsdp, model_dir)
        else:
            self._shard(fsdp, model_dir)

    def _shard(self, fsdp: FsdpConfig, model_dir: Path) -> None:
        """With FSDP2: a rank holds its own rows only, at any time."""
        shard.shard(self.root, shard.blocks(self.model), self.mesh, fsdp)
        build.materialize(self.model, torch.device("cpu") if fsdp.cpu_offload else self.device)
        self._fill(model_dir)
        if fsdp.cpu_offload:  # parameters stay on the CPU, buffers are used on the device
            _move_buffers(self.model, self.device)
        if self.device.type == "cpu" and self.mesh.size() > 1 and shard.is_small(self.root):
            self.exchange = connect(self.root, self.mesh)
        self.forward([None])  # an architecture whose attention is of another kind is refused here
        self.live, self.params = dict(named_weights(self.model)), dict(self.model.named_parameters())

    def _shard_flat(self, fsdp: FsdpConfig, model_dir: Path) -> None:
        """With FSDP1: every rank first fills the whole model in CPU memory."""
        build.materialize(self.model, torch.device("cpu"))
        self._fill(model_dir)
        # By the names without FSDP1's wrappers; it keeps these objects.
        self.live, self.params = dict(named_weights(self.model)), dict(self.model.named_parameters())
        self.root = shard.shard_flat(self.root, shard.blocks(self.model), self.mesh, fsdp, self.device)
        self.forward([None])  # as above

    def _build(self, config: PretrainedConfig, precision: str) -> None:
        raise NotImplementedError

    def _fill(self, model_dir: Path) -> None:
        raise NotImplementedError

    def __call__(self, unit: TokenBatch, *, with_entropy: bool = False) -> TokenOutputs:
        """Compute what the model says of a unit's loss tokens; with gradients, unless they are turned off."""
        tokens = FlatTokens.of(unit.ids_N, unit.positions_N, unit.segments, self.device)
        return self._outputs(tokens, unit.source_M.to(self.device), unit.targets_M.to(self.device), with_entropy)

    def _outputs(self, tokens: FlatTokens, source_M: Tensor, targets_M: Tensor, with_entropy: bool) -> TokenOutputs:
        raise NotImplementedError

    def idle(self) -> Tensor:
        """Take part in the collectives of other ranks' units; returns a 0 whose gradients are 0."""
        none_M = torch.zeros(0, dtype=torch.int64, device=self.device)
        return self.values(self._outputs(FlatTokens.none(self.device), none_M, none_M, False)).sum()

    def values(self, outputs: TokenOutputs) -> Tensor:
        """The model's own value per loss token, float32 [M]: a policy's log-prob, a critic's value."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, units: Sequence[TokenBatch | None]) -> dict[int, Tensor]:
        """As `Trainer.forward`."""
        training = self.model.training
        self.model.eval()
        found = {}
        for unit in units:
            if unit is None:
                self.idle()
            else:
                found[unit.index] = self.values(self(unit)).cpu()
        self.model.train(training)
        shard.reshard(self.root)  # no backward pass does it, and weights are read from the sharded parameters
        return found


class ShardedPolicy(ShardedModel):
    """A causal LM: log-probs under softmax(logits / temperature), and their entropy."""

    def __init__(self, *args: Any, temperature: float, **kwargs: Any) -> None:
        self.temperature = temperature
        super().__init__(*args, **kwargs)

    def _build(self, config: PretrainedConfig, precision: str) -> None:
        self.model = build.build_on_meta(config, precision)
        self.root = ScoredModel(self.model)

    def _fill(self, model_dir: Path) -> None:
        fill(self.model, HfWeights(model_dir, WeightNames.of(self.model)))

    def _outputs(self, tokens: FlatTokens, source_M: Tensor, targets_M: Tensor, with_entropy: bool) -> TokenOutputs:
        logprob_M, entropy_M = self.root(
            *(tokens.ids_N, tokens.positions_N, tokens.layout, source_M, targets_M), self.temperature, with_entropy
        )
        return TokenOutputs(logprob_M=logprob_M, entropy_M=entropy_M)

    def values(self, outputs: TokenOutputs) -> Tensor:
        assert outputs.logprob_M is not None
        return outputs.logprob_M


class ShardedCritic(ShardedModel):
    """A token classifier with one label: the value before each loss token, the expected return from there on."""

    section: ClassVar[str] = "critic"

    def _build(self, config: PretrainedConfig, precision: str) -> None:
        self.model = build.build_value_model_on_meta(config, precision)
        self.root = ValueModel(self.model)

    def _fill(self, model_dir: Path) -> None:
        names = WeightNames.of(self.model)
        where = f"critic.model.model_path={model_dir}"
        wanted_by = "a critic, which is a token classifier with one label,"
        fill(self.model, HfWeights(model_dir, names, where=where, wanted_by=wanted_by, may_lack=self._is_head))

    def _is_head(self, name: str) -> bool:
        return not name.startswith(f"{self.model.base_model_prefix}.")

    def _outputs(self, tokens: FlatTokens, source_M: Tensor, targets_M: Tensor, with_entropy: bool) -> TokenOutputs:
        return TokenOutputs(value_M=self.root(tokens.ids_N, tokens.positions_N, tokens.layout, source_M))

    def values(self, outputs: TokenOutputs) -> Tensor:
        assert outputs.value_M is not None
        return outputs.value_M


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
