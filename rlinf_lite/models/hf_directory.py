"""Hugging Face model directories: locate and check them, load config and tokenizer, compute fingerprints."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES

from rlinf_lite import fingerprints
from rlinf_lite.errors import ConfigError
from rlinf_lite.models.config_checks import import_checks
from rlinf_lite.models.files import check_files, read_object
from rlinf_lite.paths import expand

import_checks()

EMBEDDED = "embedded:"
TOKENIZER_FILES = "actor.tokenizer (files)"
"""The key of `tokenizer_fingerprint` in a run's identity."""
_NOT_OF_THE_ARCHITECTURE = ("_name_or_path", "transformers_version")
_EMBEDDED_DIR = Path(__file__).parent / "embedded"
# RLinf's names of architectures that have another name in transformers.
_ALIASES = {"qwen2.5": "qwen2"}
_TEXT_ENDINGS = {".json", ".jinja", ".model", ".txt"}
_MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors.index.json"}
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Names that families have for it in ``config.json``."""


def resolve(model_path: str, key: str = "actor.model.model_path") -> Path:
    """Return the directory of ``model_path``, a path or ``embedded:NAME``.

    Raises:
        ConfigError: there is no such directory, or it lacks ``config.json``; names ``key``.
    """
    if model_path.startswith(EMBEDDED):
        directory = _EMBEDDED_DIR / model_path.removeprefix(EMBEDDED)
        known = ", ".join(
            f"{EMBEDDED}{p.name}" for p in sorted(_EMBEDDED_DIR.iterdir()) if (p / "config.json").exists()
        )
        remedy = f"known: {known}"
    else:
        try:
            directory = Path(expand(model_path)).resolve()
        except ValueError as error:
            raise ConfigError(f"{key}={model_path}: {error}") from None
        remedy = (
            "give a Hugging Face directory with config.json, *.safetensors and a tokenizer "
            f"(from the hub: hf download NAME --local-dir {model_path})"
        )
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{key}={model_path}: no model found ({directory} has no config.json); {remedy}")
    return directory


def load_config(directory: Path, model_type: str | None, section: str = "actor") -> PretrainedConfig:
    """Load the model's config. ``model_type``, unless None, must be the directory's.

    Args:
        section: of the run's config, for messages.
    """
    read_object(directory / "config.json", f"{section}.model.model_path")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{section}.model.model_path={directory}: config.json is not usable: {_first_line(error)}"
        ) from None
    if model_type is not None and _ALIASES.get(model_type, model_type) != config.model_type:
        raise ConfigError(
            f"{section}.model.model_type={model_type}: {directory} holds a {config.model_type}; write that, or null"
        )
    return config


def has_experts(config: PretrainedConfig) -> bool:
    """Whether the model is a mixture of experts."""
    return any(getattr(config.get_text_config(), name, None) for name in _NUM_EXPERTS)


def check_length(config: PretrainedConfig, seq_length: int, asked: str | None = None) -> None:
    """Check that the model has positions for rows of ``seq_length`` tokens.

    Args:
        asked: what asks for ``seq_length`` in the message; None: ``runner.seq_length``.

    Raises:
        ConfigError: rows of ``seq_length`` tokens are longer than the model has positions for.
    """
    positions = _positions(config)
    if positions is not None and seq_length > positions:
        raise ConfigError(
            f"{asked or f'runner.seq_length={seq_length}'}: the model has positions for {positions} tokens "
            f"(max_position_embeddings in its config.json); use at most {positions}, for prompt and response together"
        )


def check_critic(config: PretrainedConfig, directory: Path) -> None:
    """Check that a critic can be built on the architecture that ``directory`` holds. Imports no model.

    Raises:
        ConfigError: transformers has no token classifier of this type.
    """
    if config.model_type not in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES:
        raise ConfigError(
            f"transformers has no token classifier for the model type {config.model_type}, which the critic's values "
            "need",
            key="critic.model.model_path",
            value=directory,
            remedy="give a model of a type that has one, such as Llama, Mistral, Qwen 2 and 3, Gemma or GPT-2; it must "
            "have the policy's tokenizer",
        )


def _positions(config: PretrainedConfig) -> int | None:
    """Maximum length of a row in tokens; None if unlimited. Not every family has these attributes."""
    positions = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if positions is None or rope.get("rope_type") not in ("linear", "dynamic", "yarn"):
        return positions
    return max(positions, int(rope["factor"] * rope.get("original_max_position_embeddings", positions)))


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The directory's tokenizer, from local files only."""
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the Rust library raises no narrower type
        check_files(directory, "actor.tokenizer.tokenizer_model")
        raise ConfigError(
            f"actor.tokenizer.tokenizer_model={directory}: no usable tokenizer: {_first_line(error)}; "
            "give a directory with tokenizer.json and tokenizer_config.json"
        ) from None


def fingerprint(directory: Path) -> str:
    """sha256 of config, tokenizer, and size and samples of each weight file (all of it below 4 MiB).

    Samples, because hashing tens of GB at each start would take minutes; fine-tuning changes them all.
    """
    return _fingerprint(directory, lambda file: file.suffix in _TEXT_ENDINGS | {".safetensors"})


def tokenizer_fingerprint(directory: Path) -> str:
    """sha256 of the directory's tokenizer files."""
    return _fingerprint(directory, lambda file: file.suffix in _TEXT_ENDINGS and file.name not in _MODEL_FILES)


def _fingerprint(directory: Path, counts: Callable[[Path], bool]) -> str:
    digest = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        if file.is_file() and counts(file):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            _hash_samples(file, digest)
    return digest.hexdigest()


def config_digest(config: PretrainedConfig) -> str:
    """sha256 of an architecture, independent of its directory and of the version of transformers."""
    described = {key: value for key, value in config.to_dict().items() if key not in _NOT_OF_THE_ARCHITECTURE}
    return fingerprints.of_value(described, default=str)


def _hash_samples(file: Path, digest: hashlib._Hash) -> None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= _SAMPLES * _SAMPLE_BYTES:
            digest.update(stream.read())
            return
        for i in range(_SAMPLES):
            stream.seek(i * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
