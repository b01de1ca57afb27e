"""Makes an evaluation's config: settings of the run that MODEL belongs to, or defaults; then what the user sets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlinf_lite.checkpoint import layout
from rlinf_lite.checkpoint.identify import located
from rlinf_lite.checkpoint.storage import StoragePath
from rlinf_lite.config import ConfigError, EvalConfig, build_evaluation, flatten, keys, known_keys, nearest
from rlinf_lite.config.schema import is_text
from rlinf_lite.config.versions import versions
from rlinf_lite.eval.source import Source
from rlinf_lite.models.hf_directory import EMBEDDED, load_config

SAMPLING = "algorithm.val_sampling_params"
_OF_MODEL = ("actor.model.model_path", "actor.model.model_type", "rollout.model.model_path", "rollout.model.model_type")
_OF_ANY_ENGINE = ("rollout.model.", "rollout.max_running_requests")
_PLAIN_ARITHMETIC = {
    "data.type": "arithmetic",
    "data.max_prompt_length": 8,
    f"{SAMPLING}.max_new_tokens": 4,
    "reward.reward_type": "exact",
}
_PRECISIONS = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}
_FROM_STEP = re.compile(r"config\.from_step_(\d+)\.yaml")


def configure(source: Source, given: Mapping[str, Any], *, of_run: str | None = None) -> EvalConfig:
    """The config of an evaluation.

    Args:
        given: what the user says, by dotted key.
        of_run: take the settings of this run (its directory, or a YAML) for a model that is not its own.

    Raises:
        ConfigError: a key that is unknown or plays no part, a value that cannot be, or nothing to evaluate.
    """
    settings = _settings_of(of_run) if of_run else _settings_of_source(source)
    settings = _follow(settings)
    made_of = source.manifest.info.get("model_path") if source.manifest else str(source.directory)
    if of_run:
        settings = {key: value for key, value in settings.items() if key not in _OF_MODEL}
    if made_of is not None:
        settings.setdefault("actor.model.model_path", made_of)
    _refuse_unused(given)
    return _typed({**_without_what_is_replaced(settings, given), **given}, source)


def overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """``key=value`` words as ``{dotted key: value}``, each value read as YAML.

    Raises:
        ConfigError: a word is no ``key=value``.
    """
    found: dict[str, Any] = {}
    for argument in arguments:
        key, is_override, text = argument.partition("=")
        if not is_override:
            raise ConfigError(f"{argument!r}: neither an option nor key=value")
        try:
            found[key] = OmegaConf.select(OmegaConf.from_dotlist([argument]), key)
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"{argument}: {str(error).splitlines()[0]}") from None
        if OmegaConf.is_config(found[key]):
            found[key] = OmegaConf.to_container(found[key])
        elif isinstance(found[key], bool | int | float) and key in keys() and is_text(keys()[key].kind):
            found[key] = text
    return found


def identity(
    config: EvalConfig, *, device: str, num_samples: int, fingerprints: Mapping[str, str | None]
) -> dict[str, Any]:
    """Everything that makes the numbers, as JSON values: rows of two evaluations that differ here do not mix."""
    made = flatten(config, neutral_keys=False)
    made |= {"cluster.device": device, "--num-samples": num_samples} | dict(fingerprints)
    made |= versions(config.rollout)
    read_back: dict[str, Any] = json.loads(json.dumps(made))
    return read_back


def _settings_of_source(source: Source) -> dict[str, Any]:
    if source.manifest is not None:
        return _settings_of_checkpoint(source)
    if source.name.startswith(EMBEDDED):
        return {**_of_directory(source), **_PLAIN_ARITHMETIC}
    return _of_directory(source)


def _of_directory(source: Source) -> dict[str, Any]:
    """Computed as it is stored, in batches that only ``rollout.max_running_requests`` limits."""
    assert isinstance(source.directory, Path)
    stored = _PRECISIONS.get(str(load_config(source.directory, None).dtype), "fp32")
    return {"rollout.model.precision": stored, "data.val_rollout_batch_size": "${rollout.max_running_requests}"}


def _settings_of_checkpoint(source: Source) -> dict[str, Any]:
    """From the YAML that the run left two directories above;
    what made its numbers is in the manifest, and counts more."""
    assert source.manifest is not None
    run = source.directory.parent.parent
    file = max(_yamls(run, source.step), default=None)
    settings = _flat(file[1]) if file else {}
    made = source.manifest.info.get("identity", {})
    return settings | {
        key: _with_neutral(value, settings.get(key)) for key, value in made.items() if key in keys(EvalConfig)
    }


def _with_neutral(made: Any, written: Any) -> Any:
    """The value of a key in the manifest. Items of a list of sections get their neutral keys from the YAML."""
    if not isinstance(made, list) or not isinstance(written, list) or len(made) != len(written):
        return made
    both = zip(made, written, strict=True)
    return [{**old, **new} if isinstance(old, dict) and isinstance(new, dict) else new for new, old in both]


def _yamls(run: StoragePath, step: int) -> Iterator[tuple[int, StoragePath]]:
    """(first step, file) of the configs that the run had until ``step``."""
    if (run / "config.yaml").is_file():
        yield 0, run / "config.yaml"
    for file in run.glob("config.from_step_*.yaml"):
        if (match := _FROM_STEP.fullmatch(file.name)) and int(match[1]) < step:
            yield int(match[1]), file


def _settings_of(of_run: str) -> dict[str, Any]:
    try:
        where = located(of_run)
    except ValueError as error:
        raise ConfigError(f"--config {error}") from None
    if layout.step_of(where) is not None:
        where = where.parent.parent
    if where.is_dir():
        where = where / "config.yaml"
    if not where.is_file():
        raise ConfigError(f"--config {of_run}: there is no {where}; give a run's directory, or its config.yaml")
    return _flat(where)


def _flat(file: StoragePath) -> dict[str, Any]:
    """The keys of a YAML that an evaluation reads."""
    try:
        raw = OmegaConf.create(file.read_text(encoding="utf-8"))
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not a config ({str(error).splitlines()[0]})") from None
    if not isinstance(raw, DictConfig):
        raise ConfigError(f"{file}: not a config")
    if "defaults" in raw:
        raise ConfigError(f"{file}: to be composed with others; give the config.yaml that a run wrote")
    chosen = {key: OmegaConf.select(raw, key) for key in keys(EvalConfig) if _has(raw, key)}
    return {key: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for key, v in chosen.items()}


def _has(raw: DictConfig, key: str) -> bool:
    path, _, name = key.rpartition(".")
    section = OmegaConf.select(raw, path)
    return isinstance(section, DictConfig) and name in section


def _follow(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A run's YAML has no interpolations any more: what was the same as another key follows it again."""
    follows = {
        "rollout.model.model_path": "actor.model.model_path",
        "rollout.model.model_type": "actor.model.model_type",
        "actor.tokenizer.tokenizer_model": "actor.model.model_path",
    }
    return {
        key: value for key, value in settings.items() if not (key in follows and value == settings.get(follows[key]))
    }


def _without_what_is_replaced(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What makes no sense beside the engine, or the kind of data, that the user asks for instead of the run's."""
    kept = dict(settings)
    backend = "rollout.rollout_backend"
    if given.get(backend, kept.get(backend)) != kept.get(backend):
        for key in [key for key in kept if key.startswith("rollout.") and not key.startswith(_OF_ANY_ENGINE)]:
            del kept[key]
    if given.get("data.type", kept.get("data.type")) != kept.get("data.type"):
        kept.pop("data.val_data_paths", None)
    return kept


def _refuse_unused(given: Mapping[str, Any]) -> None:
    known = known_keys()
    sections = {key[:end] for key in known for end, letter in enumerate(key) if letter == "."}
    open_ended = tuple(f"{key}." for key in known if key not in sections)
    for key in given:
        if key not in known and not key.startswith(open_ended):
            raise ConfigError(f"{key}: unknown key{nearest(key, known)}")
        if key not in known_keys(EvalConfig) and not key.startswith(tuple(f"{name}." for name in keys(EvalConfig))):
            near = key.replace("algorithm.sampling_params", SAMPLING)
            hint = f"; {near} does" if near != key else ""
            raise ConfigError(f"{key}: plays no part in an evaluation{hint}")


def _typed(settings: Mapping[str, Any], source: Source) -> EvalConfig:
    if "actor.model.model_path" not in settings:
        raise ConfigError(
            f"actor.model.model_path: {source.name} does not say which model it was made of; give the Hugging Face "
            "directory of its base model, actor.model.model_path=..."
        )
    raw = OmegaConf.create({})
    for key, value in settings.items():
        if key != "data.train_data_paths":  # of the run; not read here
            OmegaConf.update(raw, key, value)
    config = build_evaluation(raw)
    if config.data.type == "math" and not config.data.val_data_paths:
        raise ConfigError(f"nothing to evaluate: {source.name} comes with no validation data; give --data FILE ...")
    return config
