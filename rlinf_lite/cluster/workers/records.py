"""What workers tell the driver about themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlinf_lite.cluster.stacks import Process
from rlinf_lite.types import Group

WeightShapes = dict[str, tuple[int, ...]]
"""Name and whole shape of every weight, in the order in which weights are published."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerLocation:
    """The process and node that a worker runs on."""

    process: Process
    node_id: str
    address: str
    """IP address of the node."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreAddress:
    """Where the processes of one process group meet."""

    host: str
    port: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RankLayout:
    """How the ranks of one process group are divided over the models that are trained."""

    sizes: Mapping[str, int]
    """Number of ranks by section, in their order: ``{"actor": 2, "critic": 1}``."""

    @property
    def num_ranks(self) -> int:
        """Of all models."""
        return sum(self.sizes.values())

    @property
    def ranks(self) -> dict[str, range]:
        """The ranks of each section."""
        return {section: range(self.first(section), self.first(section) + size) for section, size in self.sizes.items()}

    def first(self, section: str) -> int:
        """The first rank of a section."""
        names = list(self.sizes)
        return sum(self.sizes[name] for name in names[: names.index(section)])


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerSetup:
    """What a rank of a policy or critic has built."""

    num_parameters: int
    tied: dict[str, str]
    """Weights that share a tensor with an earlier one: ``{"lm_head.weight": "model.embed_tokens.weight"}``."""
    compute: str
    """Devices and libraries that decide which kernels run."""
    weights: WeightShapes


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedAhead:
    """Responses that an engine began with as soon as it had new weights, before these were compared."""

    rank: int
    """The engine's."""
    groups: list[Group]
    weights: Mapping[str, int] | None
    """Checksums of the weights that the responses were sampled with; None: the engine cannot say."""


Generated = list[Group] | GeneratedAhead


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSetup:
    """What a rollout worker has built."""

    compute: str
    """Devices and libraries that decide which kernels run."""
    weights: WeightShapes
    comparable: bool
    """Whether it can say which weights it holds."""
