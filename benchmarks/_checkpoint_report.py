"""The tables of the checkpoint benchmark: medians, ratios within a round, their spread, and targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from _checkpoint_rank import FRACTIONS, TOKENS, Setup
from _checkpoint_rounds import Save, Transfer
from _checkpoint_trl import NOT_INSTALLED

ASYNC = "ours async 0.1"
ROWS = {
    ASYNC: ("ours, async", "yes", "Checkpointer.start, and fence in an optimizer pre-step hook"),
    "ours": ("ours, sync", "yes", "Checkpointer.save"),
    "dcp.save": ("dcp.save", "yes", "torch.distributed.checkpoint.save, its defaults"),
    "dcp.async_save": (
        "dcp.async_save",
        "yes",
        "its defaults (a thread), own gloo group; copies the state first",
    ),
    "torch.save": ("torch.save", "no", "each rank a dict of its own shards into a file of its own"),
    "trl": ("TRL GRPOTrainer", "no", "its _save_checkpoint after one training step; one process holds the whole state"),
}
READS = {
    "full": "ours, verify=full",
    "size": "ours, verify=size",
    "off": "ours, verify=off",
    "dcp.load": "dcp.load (no check)",
}


@dataclass(frozen=True, slots=True)
class Spread:
    """Some samples of one thing."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.samples)

    def show(self, digits: int) -> str:
        low, high = min(self.samples), max(self.samples)
        return f"{self.median:.{digits}f} ({low:.{digits}f}..{high:.{digits}f})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    name: str
    value: float
    limit: float
    at_most: bool

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def show(self) -> str:
        sign = "<=" if self.at_most else ">="
        return f"  target: {self.name} {sign} {self.limit:g}: {self.value:.4f} {'met' if self.met else 'MISSED'}"


@dataclass(kw_only=True, slots=True)
class Report:
    """All samples of a run and the report about them."""

    setup: Setup
    state_bytes: list[int]
    rollout_seconds: float
    file_system: str
    trl_version: str | None
    loop: list[Save] = field(default_factory=list)
    short: list[Save] = field(default_factory=list)
    writes: list[Transfer] = field(default_factory=list)
    reads: list[Transfer] = field(default_factory=list)

    # -- numbers

    def loop_of(self, method: str, value: Callable[[Save], float]) -> Spread:
        return _of(self.loop, method, value)

    def stall_ratio(self, method: str) -> Spread:
        return _ratios(self.loop, method, "dcp.save", lambda save: save.blocked_seconds)

    def memory_percent(self, method: str) -> Spread:
        whole = sum(self.state_bytes) if method == "trl" else max(self.state_bytes)
        return self.loop_of(method, lambda save: 100 * save.peak_bytes / whole)

    def slow_down(self, method: str) -> Spread:
        """Seconds that a step with a save in flight took longer, the seconds that it waited apart."""
        plain = self.loop_of("none", lambda save: save.step_seconds).median
        return self.loop_of(method, lambda save: save.step_seconds - save.blocked_seconds - plain)

    def write_ratio(self, limit: str) -> Spread:
        return _ratios(self.writes, "ours", limit, lambda write: write.gb_per_second)

    def read_ratio(self, method: str, *, cold: bool) -> Spread:
        reads = [read for read in self.reads if read.cold == cold]
        return _ratios(reads, method, "plain", lambda read: read.gb_per_second)

    def targets(self) -> dict[str, Target]:
        return {
            "stall": Target(
                name="stall of async / dcp.save", value=self.stall_ratio(ASYNC).median, limit=0.02, at_most=True
            ),
            "memory": Target(
                name="extra memory of async, % of a rank's state",
                value=self.memory_percent(ASYNC).median,
                limit=10,
                at_most=True,
            ),
            "write": Target(
                name="sync save / plain write + fsync", value=self.write_ratio("plain").median, limit=0.8, at_most=False
            ),
            "read": Target(
                name="load with verify=full / plain read, both cold",
                value=self.read_ratio("full", cold=True).median,
                limit=0.8,
                at_most=False,
            ),
        }

    def missed(self) -> list[str]:
        return [target.name for target in self.targets().values() if not target.met]

    def as_json(self) -> dict[str, Any]:
        """Every sample, and what the targets are held against."""
        return {
            "model": str(self.setup.model_dir or "random weights"),
            "quick": self.setup.quick,
            "state_bytes": self.state_bytes,
            "rollout_seconds": self.rollout_seconds,
            "file_system": self.file_system,
            "trl_version": self.trl_version,
            "targets": {key: {**asdict(target), "met": target.met} for key, target in self.targets().items()},
            "loop": [asdict(save) for save in self.loop],
            "short": [asdict(save) for save in self.short],
            "writes": [asdict(write) for write in self.writes],
            "reads": [asdict(read) for read in self.reads],
        }

    # -- text

    def text(self) -> str:
        sections = [self._head(), self._stall(), self._slow_downs(), self._fences(), self._writes(), self._reads()]
        return "\n\n".join("\n".join(section) for section in sections)

    def _head(self) -> list[str]:
        state, rounds = sum(self.state_bytes) / 1e9, 1 + max(save.round for save in self.loop)
        quick = ["--quick: the figures below mean nothing"] if self.setup.quick else []
        model = self.setup.model_dir or f"{'a tiny' if self.setup.quick else 'the 135M'} Llama, random weights"
        return [
            *quick,
            f"{model}; fp32 and AdamW: {state:.3g} GB of state over {self.setup.world_size} ranks; on "
            f"{self.file_system}; {rounds} rounds; median (lowest..highest)",
        ]

    def _stall(self) -> list[str]:
        step = self.loop_of("none", lambda save: save.step_seconds)
        lines = [
            f"1. What a save costs the step loop (a step: {self.rollout_seconds:g} s of rollout and an update of "
            f"{self.setup.world_size} x {TOKENS} tokens: {step.show(2)} s)",
            f"   {'':16}{'loop waits, s':>26}{'/ dcp.save':>26}{'durable, s':>21}{'extra memory, %':>23}"
            f"{'GB':>6}  fsync",
        ]
        for method, (name, syncs, _) in ROWS.items():
            if method == "trl" and self.trl_version is None:
                why = "left out by --quick" if self.setup.quick else NOT_INSTALLED
                lines.append(f"   {name:16} {why}")
                continue
            lines.append(
                f"   {name:16}{self.loop_of(method, lambda save: save.blocked_seconds).show(4):>26}"
                f"{self.stall_ratio(method).show(4):>26}"
                f"{self.loop_of(method, lambda save: save.durable_seconds).show(2):>21}"
                f"{self.memory_percent(method).show(1):>23}"
                f"{self.loop_of(method, lambda save: save.num_bytes / 1e9).median:>6.2f}  {syncs}"
            )
        lines += [f"   {name}: {what}" for name, _, what in ROWS.values()]
        lines += [
            "   durable: until all bytes are on the disk; where the method does no fsync, one of ours follows it",
            "   extra memory: most resident memory above that before the save, % of the state of that process",
        ]
        return [*lines, self.targets()["stall"].show(), self.targets()["memory"].show()]

    def _slow_downs(self) -> list[str]:
        lines = [
            "2. Slow-down by the write in the background (dip x duration: seconds that the step with the save took",
            "   longer than the median one without, the wait of 1 apart)",
        ]
        for method in (ASYNC, "dcp.async_save"):
            durable = self.loop_of(method, lambda save: save.durable_seconds).median
            lines.append(
                f"   {ROWS[method][0]:16}{self.slow_down(method).show(2):>25} s, of a write of {durable:.2f} s"
            )
        return lines

    def _fences(self) -> list[str]:
        lines = [
            "3. The worst case for ours: no rollout, no forward and backward, optimizer.step() right after the start;",
            "   by the part of the state that the fence may stage in memory instead of waiting until it is written",
            f"   {'staged_fraction':16}{'start, s':>26}{'fence, s':>26}{'with step, s':>21}{'extra memory, %':>23}",
        ]
        base = _of(self.short, "none", lambda save: save.peak_bytes).median
        for fraction in FRACTIONS:
            method = f"ours async {fraction}"
            memory = _of(self.short, method, lambda save: 100 * (save.peak_bytes - base) / max(self.state_bytes))
            lines.append(
                f"   {fraction:<16}{_of(self.short, method, lambda save: save.start_seconds).show(4):>26}"
                f"{_of(self.short, method, lambda save: save.fence_seconds).show(3):>26}"
                f"{_of(self.short, method, lambda save: save.step_seconds).show(2):>21}{memory.show(1):>23}"
            )
        step = _of(self.short, "none", lambda save: save.step_seconds)
        lines.append(f"   {'no save':16}{'':52}{step.show(2):>21}")
        return lines

    def _writes(self) -> list[str]:
        lines = [
            "4. Durable throughput of a blocking save (plain: as many bytes by as many processes, in blocks of 8 MiB",
            "   from one buffer, then fsync)",
            f"   {'':24}{'GB/s':>25}{'ours / this':>25}",
        ]
        lines.append(f"   {'ours, sync':24}{_rate(self.writes, 'ours'):>25}")
        for method, name in (("plain", "plain, buffered"), ("plain direct", "plain, O_DIRECT")):
            lines.append(f"   {name:24}{_rate(self.writes, method):>25}{self.write_ratio(method).show(3):>25}")
        pairs = zip(*(self.write_ratio(method).samples for method in ("plain", "plain direct")), strict=True)
        best = Spread(tuple(min(pair) for pair in pairs))
        lines.append(f"   {'the better of both':24}{'':25}{best.show(3):>25}")
        return [*lines, self.targets()["write"].show()]

    def _reads(self) -> list[str]:
        lines = [
            "5. Load (plain: the same bytes by as many processes; cold: dropped from the page cache before)",
            f"   {'':24}{'cold, GB/s':>25}{'/ plain, cold':>25}{'warm, GB/s':>25}{'/ plain, warm':>25}",
        ]
        for method, name in {"plain": "plain read", **READS}.items():
            cells = ""
            for cold in (True, False):
                reads = [read for read in self.reads if read.cold == cold]
                ratio = "" if method == "plain" else self.read_ratio(method, cold=cold).show(3)
                cells += f"{_rate(reads, method):>25}{ratio:>25}"
            lines.append(f"   {name:24}{cells}".rstrip())
        return [*lines, self.targets()["read"].show()]


def _rate(transfers: Iterable[Transfer], method: str) -> str:
    return _of(transfers, method, lambda transfer: transfer.gb_per_second).show(2)


def _of(samples: Iterable[Any], method: str, value: Callable[[Any], float]) -> Spread:
    return Spread(tuple(value(sample) for sample in samples if sample.method == method))


def _ratios(samples: Iterable[Any], method: str, other: str, value: Callable[[Any], float]) -> Spread:
    """``method`` over ``other``, each pair from the same round."""
    samples = list(samples)
    below = {sample.round: value(sample) for sample in samples if sample.method == other}
    return Spread(tuple(value(sample) / below[sample.round] for sample in samples if sample.method == method))
