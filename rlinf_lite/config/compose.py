"""From the command line to a checked `Config`: Hydra composes it from YAML files and overrides."""

from __future__ import annotations

from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from rlinf_lite.config.load import build
from rlinf_lite.config.overrides import readable
from rlinf_lite.config.rlinf import Note, silent
from rlinf_lite.config.rules import check
from rlinf_lite.config.schema import Config
from rlinf_lite.errors import ConfigError
from rlinf_lite.paths import expand

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DEFAULT = "grpo-tiny-arithmetic"


def load(arguments: list[str], note: Note = silent) -> Config:
    """Compose, type and check the config.

    Args:
        arguments: ``[config name or path] [hydra overrides ...]``; without a name, the embedded default.
        note: is called with a line for each value that is accepted and has no effect.

    Raises:
        ConfigError: anything that cannot be run.
    """
    named = bool(arguments) and "=" not in arguments[0] and not arguments[0].startswith(("~", "+"))
    named = named or (bool(arguments) and arguments[0].startswith("~") and arguments[0].endswith((".yaml", ".yml")))
    name, overrides = (expand(arguments[0]), arguments[1:]) if named else (DEFAULT, arguments)
    directory, stem = (
        (Path(name).resolve().parent, Path(name).stem) if name.endswith((".yaml", ".yml")) else (CONFIGS, name)
    )
    if not (directory / f"{stem}.yaml").is_file():
        known = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
        raise ConfigError(f"config {name!r}: there is no {directory / f'{stem}.yaml'}; known: {known}")
    config = build(_compose(directory, stem, overrides), note)
    check(config)
    return config


def _compose(directory: Path, stem: str, overrides: list[str]) -> DictConfig:
    try:
        shipped = [] if directory == CONFIGS else [f"hydra.searchpath=[file://{CONFIGS}]"]
        with initialize_config_dir(str(directory), version_base="1.3"):
            return compose(stem, overrides=[*shipped, *readable(overrides, lambda key: (directory / key).is_dir())])
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        reason = " ".join(line.strip() for line in str(error.__cause__ or error).splitlines()[:3])
        raise ConfigError(f"config {stem!r} with {overrides}: {reason}") from None
