"""The rounds of the checkpoint benchmark, as the driver runs them: each does every method once, in rotated order."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from _checkpoint_generator import Generator
from _checkpoint_plain import drop_from_cache, files_under, split, sync_file
from _checkpoint_rank import Rank, Setup
from _checkpoint_trl import TrlTrainer, installed
from _checkpoint_workers import Team

LOOP = ("none", "ours async 0.1", "dcp.async_save", "ours", "dcp.save", "torch.save", "trl")
SHORT = ("none", "ours async 0.0", "ours async 0.1", "ours async 1.0")
WRITES = ("ours", "plain", "plain direct")
READS = ("plain", "full", "size", "off", "dcp.load")


@dataclass(frozen=True, kw_only=True, slots=True)
class Save:
    """One save in the step loop (or, ``method="none"``, a step without one)."""

    round: int
    method: str
    start_seconds: float
    """Until the loop continues, of the slowest rank; for a blocking save, until it returns."""
    fence_seconds: float
    """That `optimizer.step()` waited."""
    durable_seconds: float
    """From the start until the bytes are on the disk (with an fsync of ours where the method does none)."""
    step_seconds: float
    """Of the whole step; 0 for a blocking save, which is taken between steps."""
    peak_bytes: int
    """Most resident memory above that at the start; of the rank with most."""
    num_bytes: int
    """Size of the files."""

    @property
    def blocked_seconds(self) -> float:
        return self.start_seconds + self.fence_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """One durable write or one read of a whole checkpoint."""

    round: int
    method: str
    cold: bool
    seconds: float
    num_bytes: int

    @property
    def gb_per_second(self) -> float:
        return self.num_bytes / self.seconds / 1e9


class Bench:
    """All processes, and one committed checkpoint to read."""

    def __init__(self, setup: Setup, *, rollout_seconds: float) -> None:
        self.setup, self._step = setup, 0
        self._stack = ExitStack()
        try:
            self._start(rollout_seconds)
        except BaseException:
            self._stack.close()
            raise

    def _start(self, rollout_seconds: float) -> None:
        numbers, config = range(self.setup.world_size), self.setup.model_config()
        self.ranks = self._stack.enter_context(Team("rank", [(Rank, (self.setup, rank)) for rank in numbers]))
        shape = (config.num_hidden_layers, config.hidden_size, config.intermediate_size)
        self.generators = self._stack.enter_context(Team("generator", [(Generator, shape) for _ in numbers]))
        self.trl = None
        if installed() and not self.setup.quick:
            self.trl = self._stack.enter_context(Team("trl", [(TrlTrainer, (self.setup,))]))
        self.state_bytes: list[int] = self.ranks.ask(Rank.state_bytes)
        self.trl_version = self.trl.ask(TrlTrainer.version)[0] if self.trl else None  # it is built now, and quiet
        needed, free = 3 * sum(self.state_bytes), shutil.disk_usage(self.setup.directory).free
        if free < needed:
            raise OSError(
                f"--dir {self.setup.directory}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
            )
        self.num_tokens = self._tokens_in(rollout_seconds)
        self.ranks.ask(Rank.save, "ours", self._next())
        self.kept = self._saved("ours")
        self.num_bytes = sum(path.stat().st_size for path in files_under(self.kept))

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _tokens_in(self, seconds: float) -> int:
        """Tokens that the generators decode in ``seconds`` when all of them run and nothing else does."""
        probe, taken = 2, 1e-9
        while taken < min(1.0, seconds):
            probe *= 2
            taken = max(self.generators.ask(Generator.roll, probe))
        return max(1, round(probe * seconds / taken))

    # -- 1 and 2: a rollout of realistic length

    def loop_round(self, number: int) -> list[Save]:
        saves = []
        for method in _rotated(LOOP, number):
            if method in ("ours", "dcp.save", "torch.save"):
                saves.append(self._blocking(number, method))
            elif method != "trl":
                saves.append(self._step_with(number, method))
            elif self.trl:
                saves.append(self._trl(number, self.trl))
        return saves

    def _step_with(self, number: int, method: str) -> Save:
        step, started = self._next(), time.perf_counter()
        begun = max(self.ranks.ask(Rank.begin, method, step))
        self.generators.ask(Generator.roll, self.num_tokens)
        rolled = time.perf_counter()
        peak = max(self.ranks.ask(Rank.peak_bytes))
        asked = time.perf_counter() - rolled
        fence = max(self.ranks.ask(Rank.update))
        seconds = time.perf_counter() - started - asked
        return self._finished(number, method, start=begun, fence=fence, step=seconds, peak=peak)

    def short_round(self, number: int) -> list[Save]:
        """3: `optimizer.step()` right after the start, when next to nothing has been read."""
        saves = []
        for method in _rotated(SHORT, number):
            self.ranks.ask(Rank.fake_gradients)
            started = time.perf_counter()
            begun = max(self.ranks.ask(Rank.begin, method, self._next()))
            fence = max(self.ranks.ask(Rank.optimize))
            seconds = time.perf_counter() - started
            saves.append(self._finished(number, method, start=begun, fence=fence, step=seconds, peak=None))
        return saves

    def _finished(self, number: int, method: str, *, start: float, fence: float, step: float, peak: int | None) -> Save:
        durable = max(self.ranks.ask(Rank.finish))
        if peak is None:
            peak = max(self.ranks.ask(Rank.peak_bytes))
        size = 0 if method == "none" else self._remove(self._saved(method))
        return Save(
            round=number,
            method=method,
            start_seconds=start,
            fence_seconds=fence,
            durable_seconds=durable,
            step_seconds=step,
            peak_bytes=peak,
            num_bytes=size,
        )

    def _blocking(self, number: int, method: str) -> Save:
        seconds = max(self.ranks.ask(Rank.save, method, self._next()))
        peak = max(self.ranks.ask(Rank.peak_bytes))
        return self._settled(number, method, seconds, peak, self._saved(method))

    def _trl(self, number: int, trl: Team) -> Save:
        (seconds,) = trl.ask(TrlTrainer.save)
        (peak,) = trl.ask(TrlTrainer.peak_bytes)
        (saved,) = trl.ask(TrlTrainer.saved_at)
        return self._settled(number, "trl", seconds, peak, saved)

    def _settled(self, number: int, method: str, seconds: float, peak: int, saved: Path) -> Save:
        started = time.perf_counter()
        for path in files_under(saved):  # at no cost where the method did it
            sync_file(path)
        synced = time.perf_counter() - started if method in ("torch.save", "trl") else 0.0
        return Save(
            round=number,
            method=method,
            start_seconds=seconds,
            fence_seconds=0.0,
            durable_seconds=seconds + synced,
            step_seconds=0.0,
            peak_bytes=peak,
            num_bytes=self._remove(saved),
        )

    # -- 4: the disk's limit

    def write_round(self, number: int) -> list[Transfer]:
        writes, num_bytes = [], -(-self.num_bytes // self.setup.world_size)
        for method in _rotated(WRITES, number):
            if method == "ours":
                seconds = max(self.ranks.ask(Rank.save, "ours", self._next()))
                size = self._remove(self._saved("ours"))
            else:
                directory = self.setup.directory / "plain"
                directory.mkdir()
                seconds = max(self.ranks.ask(Rank.write, directory, num_bytes, method == "plain direct"))
                size = self._remove(directory)
            writes.append(Transfer(round=number, method=method, cold=False, seconds=seconds, num_bytes=size))
        return writes

    def read_round(self, number: int) -> list[Transfer]:
        files, reads = files_under(self.kept), []
        parts = split(files, self.setup.world_size)
        for method in _rotated(READS, number):
            for cold in (True, False):
                if cold:
                    drop_from_cache(files)
                if method == "plain":
                    seconds = max(self.ranks.ask(Rank.read, parts))
                else:
                    seconds = max(self.ranks.ask(Rank.load, method, self.kept))
                reads.append(
                    Transfer(round=number, method=method, cold=cold, seconds=seconds, num_bytes=self.num_bytes)
                )
        return reads

    # -- files

    def _next(self) -> int:
        self._step += 1
        return self._step

    def _saved(self, method: str) -> Path:
        """The directory of the save just made."""
        if not method.startswith("ours"):
            return self.setup.directory / method / str(self._step)
        return self.setup.directory / "ours" / f"global_step_{self._step}"

    def _remove(self, saved: Path) -> int:
        """Delete a save, and let the file system do its work before the next method; the bytes it had."""
        size = sum(path.stat().st_size for path in files_under(saved))
        if not size:
            raise FileNotFoundError(f"{saved}: nothing was saved there")
        shutil.rmtree(saved)
        sync_file(saved.parent)
        return size


def _rotated(methods: tuple[str, ...], number: int) -> tuple[str, ...]:
    first = number % len(methods)
    return methods[first:] + methods[:first]
