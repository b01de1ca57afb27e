"""Starts a wandb run (new, resumed, or a branch of another one): online if there is a login, offline otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlinf_lite import fingerprints
from rlinf_lite.config import LoggerConfig
from rlinf_lite.observability.notices import log_line

_START_SECONDS = 60
_FINISH_SECONDS = 120
"""Without limits wandb waits forever for a lost network. What it could not send stays on disk for ``wandb sync``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """How a wandb run branches off another one, whose later rows no longer belong to this training.

    wandb's own ``fork_from`` needs the server and excludes ``resume``, so a kill right after it could not be resumed.
    """

    parent: str
    """Id of the run that it branches off."""
    step: int
    """The last step that both runs have."""
    reason: str

    def run_id(self, recipe: str, log_path: Path) -> str:
        """The id of the new run: the same for the same branch, so that a restart after a kill finds the same run."""
        made_of = f"{self.parent} {self.step} {recipe} {log_path.resolve()}"
        return fingerprints.of_text(made_of)[:12]

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments for ``wandb.init``."""
        return {"notes": f"Branch of run {self.parent} after step {self.step}: {self.reason}", "tags": ["branch"]}

    @property
    def config(self) -> dict[str, Any]:
        return {"branch": {"parent_run": self.parent, "after_step": self.step, "reason": self.reason}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Starter:
    """Starts the wandb runs of one process."""

    wandb: Any
    """The module wandb."""
    config: LoggerConfig
    config_dict: Mapping[str, Any]
    """The resolved config of the run."""

    def start(self, run_id: str, branch: Branch | None = None) -> Any:
        """Start the run in the configured mode, or offline if that fails. Returns None if neither works."""
        for mode in dict.fromkeys((self._mode(), "offline")):
            if mode == "disabled":
                log_line("wandb: disabled by WANDB_MODE or its settings, so nothing is sent")
                return None
            try:
                run = self._init(run_id, mode, branch)
            except (self.wandb.errors.Error, ConnectionError) as error:
                log_line(f"wandb: cannot start in mode {mode} ({str(error).splitlines()[0]})")
                continue
            log_line(self._where(run))
            return run
        return None

    def _mode(self) -> str:
        """The mode that WANDB_MODE or wandb's settings name, but offline if an online run would prompt for a key."""
        asked = self.wandb.setup().settings.mode
        mode: str = {"dryrun": "offline", "run": "online"}.get(asked, asked)
        if mode in ("offline", "disabled"):
            return mode
        try:
            if self.wandb.login(prompt=False, verify=False):
                return mode
            reason = "not logged in"
        except self.wandb.errors.Error as error:
            reason = str(error).splitlines()[0]
        log_line(
            f"wandb: {reason}, so the run is recorded offline; to send it live, run `wandb login` before the next start"
        )
        return "offline"

    def _init(self, run_id: str, mode: str, branch: Branch | None) -> Any:
        settings = self.wandb.Settings(
            console="off", quiet=True, init_timeout=_START_SECONDS, finish_timeout=_FINISH_SECONDS
        )
        return self.wandb.init(
            project=self.config.project_name,
            name=self.config.experiment_name,
            group=self.config.experiment_name,
            id=run_id,
            resume="allow",
            mode=mode,
            dir=self.config.log_path,
            config={**self.config_dict, **(branch.config if branch else {})},
            reinit="create_new",
            settings=settings,
            **(branch.settings if branch else {}),
        )

    def _where(self, run: Any) -> str:
        if not run.offline:
            return f"wandb: {run.url}"
        directory = Path(self.config.log_path) / "wandb"
        return f"wandb: offline, run {run.id}; send it with: wandb sync {directory}/offline-run-*-{run.id}"
