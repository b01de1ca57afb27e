"""The driver process: parse, build, run, close. `main_math` starts it. The only file that imports Hydra."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from rlinf_lite.recovery.handover import ParentLink
from rlinf_lite.runner.signals import end, end_at_once, end_without_parent

if __name__ == "__main__":
    # Before all other imports, which take seconds.
    end_at_once()
    _link = ParentLink.connect()
    _link.watch(end_without_parent)

from rlinf_lite import numerics

os.environ.update(numerics.environment())  # read when torch is imported: sums must not depend on the shell

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from rlinf_lite.config import Config, ConfigError, build, check
from rlinf_lite.config.overrides import readable
from rlinf_lite.config.unusual import unusual_values
from rlinf_lite.paths import expand

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DEFAULT = "grpo-tiny-arithmetic"


def main(arguments: list[str], link: ParentLink) -> int:
    """Run the config named by the first argument (or the embedded default) with the overrides that follow it.

    Args:
        link: to the parent process, whose handover says what earlier drivers of this run have come to.

    Returns:
        The exit code.
    """
    from rlinf_lite.runner.failures import explain

    try:
        config = load(arguments)
        for line in unusual_values(config):
            print(f"note: {line}", flush=True)
        from rlinf_lite.launch import launch
        from rlinf_lite.recovery.directories import checkpoints_directory, has_saved

        if link.handover.was_built and has_saved(config, checkpoints_directory(config)):
            config = load([*arguments, "runner.resume_dir=auto"])
        return launch(config, link)
    except BaseException as error:
        message, code = explain(error)
        if message is None:
            sys.excepthook(*sys.exc_info())
        else:
            print(message, file=sys.stderr, flush=True)
        return code


def load(arguments: list[str]) -> Config:
    """Compose, type and check the config.

    Args:
        arguments: ``[config name or path] [hydra overrides ...]``.

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
    config = build(_compose(directory, stem, overrides))
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


def leave(code: int, link: ParentLink) -> NoReturn:
    """End the process. One that ends early waits for no thread and no library, and leaves nothing of its Ray behind."""
    link.report(exit_code=code)
    if code == 0:
        sys.exit(0)
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    end(code)


if __name__ == "__main__":
    leave(main(sys.argv[1:], _link), _link)
