"""Overrides of the command line in the form that Hydra reads. Text stays as written; errors show how to quote."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, ValueType
from hydra.errors import HydraException

from rlinf_lite.config.schema import is_list, is_text, keys, known_keys
from rlinf_lite.config.suggestions import nearest
from rlinf_lite.config.written import TAKES
from rlinf_lite.errors import ConfigError


def readable(overrides: Sequence[str], is_group: Callable[[str], bool]) -> list[str]:
    """``overrides`` for Hydra: ``runner.experiment_name=1e3`` becomes ``++runner.experiment_name="1e3"``.

    Args:
        is_group: whether a key names a directory of configs to choose from.

    Raises:
        ConfigError: a line for each that Hydra cannot read, and how to write it.
    """
    kinds, parser = {key: spec.kind for key, spec in keys().items()}, OverridesParser.create()
    found, problems = [], []
    for override in overrides:
        try:
            found.append(_readable(override, kinds, is_group, parser))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def _readable(override: str, kinds: dict[str, Any], is_group: Callable[[str], bool], parser: OverridesParser) -> str:
    written_key, equals, text = override.partition("=")
    key, text = written_key.lstrip("+~").strip(), text.strip()
    if not key or not (equals or override.startswith("~")):
        raise ConfigError(f"{override!r}: no key=value; a config's name is the first argument, or left out")
    kind = kinds.get(key)
    try:
        parsed = parser.parse_override(override)
    except HydraException as error:
        parsed, reason = None, str(error).splitlines()[0]
    if override.startswith("~") or is_group(key):
        if parsed is None:
            raise ConfigError(f"{override}: {reason}")
        return override
    value = _quoted(text, parsed, kind)
    if value is None:
        why = "several values, and a run takes one" if parsed is not None else reason
        raise ConfigError(f"{key}={text}: {_unknown(key) or _how_to_write(key, text, kind, why, parser)}")
    # ++ lets an override name a key that the YAML leaves at its default; unknown keys are caught when it is typed.
    return f"{written_key if written_key.startswith('+') else f'++{written_key}'}={value}"


def _quoted(text: str, parsed: Override | None, kind: Any) -> str | None:
    """The value in the form that Hydra reads; None if it is not clear what was meant."""
    several = parsed is not None and parsed.is_sweep_override()
    if parsed is not None and not several and _fits(parsed, kind):
        return text
    if is_text(kind) and not text.startswith(("'", '"')):
        return _in_quotes(text)
    if is_list(kind) and not text.startswith(("'", '"', "[", "{")):
        if several and parsed is not None and parsed.value_type == ValueType.SIMPLE_CHOICE_SWEEP:
            return f"[{text}]"
        return _in_quotes(text) if "," not in text else None
    return None


def _fits(parsed: Override, kind: Any) -> bool:
    """Whether Hydra reads a value of the right kind, and not a number where text belongs."""
    value = parsed.value()
    if is_text(kind):
        return isinstance(value, str | None)
    return not is_list(kind) or isinstance(value, str | list | None)


def _in_quotes(text: str) -> str:
    quoted: str = QuotedString(text, Quote.double).with_quotes()
    return quoted


def _unknown(key: str) -> str:
    """The error for a key that does not exist; an empty text if it exists."""
    known = known_keys()
    in_mapping = any(key.startswith(f"{other}.") for other in keys())
    return "" if key in known or in_mapping else f"unknown key{nearest(key, known)}"


def _how_to_write(key: str, text: str, kind: Any, reason: str, parser: OverridesParser) -> str:
    if kind in (int, float, bool):
        return f"{TAKES[kind]} ({reason})"
    value = _in_quotes(text)
    if text.startswith("[") and text.endswith("]"):
        items = [item.strip().strip("'\"") for item in text[1:-1].split(",")]
        value = f"[{','.join(_in_quotes(item) for item in items)}]"
    example = f"{key}={value}"
    try:
        parser.parse_override(example)
    except HydraException:
        example = f'{key}="..."'
    return (
        f"Hydra cannot read it ({reason}); put text with characters such as = ~ # , into double quotes, and the "
        f"whole into single ones for the shell: {shlex.quote(example)}"
    )
