"""Takes the keys of RLinf's examples, as the table in `rlinf_keys` says; a `Config` holds our keys only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from rlinf_lite.config.rlinf_keys import RATE, TAKEN, TOKEN_SCALE, VALUES
from rlinf_lite.config.suggestions import nearest
from rlinf_lite.config.written import shown

Note = Callable[[str], None]
"""Is called with a line that the user should read."""


def silent(line: str) -> None:
    """A `Note` that nobody reads."""


def meaning(key: str) -> str:
    """What a key does, as a cell of a table."""
    spec = TAKEN[key]
    if spec.sets:
        return f"sets `{spec.sets}`"
    if spec.in_vain:
        inert = shown(not spec.only[0]) if spec.is_switch else f"a value other than {shown(spec.only[0])}"
        return f"{inert} has no effect{' with vLLM' * spec.with_vllm}: {spec.why}"
    return spec.why + (" (with vLLM; else any)" if spec.with_vllm else "")


def values(key: str, *, code: bool = True) -> str:
    """What a key takes."""
    mark = "`" if code else ""
    spec = TAKEN[key]
    if spec.in_vain:
        return f"{mark}false{mark}, {mark}true{mark}" if spec.is_switch else "any"
    return ", ".join(f"{mark}{shown(one)}{mark}" for one in spec.only) or "any"


def take(given: DictConfig, defaults: DictConfig, note: Note = silent) -> tuple[DictConfig, list[str]]:
    """Take RLinf's keys out of ``given``, in place, and give our keys what they say.

    Args:
        defaults: of our keys.
        note: is called with a line for each value that has no effect.

    Returns:
        What was taken out, resolved, for interpolations that lead there; and the problems, one line each.
    """
    for key, names in VALUES.items():
        if (value := OmegaConf.select(given, key, throw_on_resolution_failure=False)) in names:
            OmegaConf.update(given, key, names[value])
    written = list(nodes_of(given, TAKEN))
    if not written:
        return OmegaConf.create({}), []
    values: dict[str, Any] = {}
    problems = []
    merged = OmegaConf.merge(defaults, given)
    for key in written:
        try:
            values[key] = _value(merged, key)
        except InterpolationToMissingValueError:
            pass  # the key that it leads to is missing itself, and is named
        except OmegaConfBaseException as error:
            problems.append(f"{key}: {str(error).splitlines()[0]}")
    for key in written:
        section, _, name = key.rpartition(".")
        del OmegaConf.select(given, section)[name]
    problems += _others_in_their_sections(given, defaults)
    merged = OmegaConf.merge(defaults, given)  # as given from here on; `_set` keeps both alike
    for key, value in values.items():
        problems += _given_on(given, merged, key, value, note)
    problems += _learning_rate(given, merged, values)
    problems += _flags(merged, values)
    problems += _token_scale(merged, values)
    taken = OmegaConf.create({})
    for key, value in values.items():
        OmegaConf.update(taken, key, value, force_add=True)
    return taken, problems


def nodes_of(given: DictConfig, keys: Iterable[str]) -> dict[str, DictConfig]:
    """Those of ``keys`` that are written, in their order, each with the section of ``given`` that holds it."""
    nodes: dict[str, Any] = {}
    names: dict[str, set[Any]] = {}
    found = {}
    for key in keys:
        section, _, name = key.rpartition(".")
        if section not in nodes:
            nodes[section] = OmegaConf.select(given, section) if section else given
            names[section] = set(nodes[section]) if isinstance(nodes[section], DictConfig) else set()
        if name in names[section]:
            found[key] = nodes[section]
    return found


def _value(merged: Any, key: str) -> Any:
    section, _, name = key.rpartition(".")
    value = OmegaConf.select(merged, section)[name]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _others_in_their_sections(given: DictConfig, defaults: DictConfig) -> list[str]:
    """Take out sections that are not ours; what is left in them is known to nobody."""
    problems = []
    for section in dict.fromkeys(key.rpartition(".")[0] for key in TAKEN):
        left = OmegaConf.select(given, section)
        if OmegaConf.select(defaults, section) is None and isinstance(left, DictConfig):
            names = [f"{section}.{name}" for name in map(str, left)]
            problems += [f"{name}: unknown key{nearest(name, list(TAKEN))}" for name in names]
            parent, _, name = section.rpartition(".")
            del OmegaConf.select(given, parent)[name]
    return problems


def _given_on(given: DictConfig, merged: Any, key: str, value: Any, note: Note) -> list[str]:
    """Check a value, and set what it sets."""
    spec = TAKEN[key]
    counts = not spec.with_vllm or OmegaConf.select(given, "rollout.rollout_backend") == "vllm"
    if counts and spec.only and not any(type(value) is type(one) and value == one for one in spec.only):
        if spec.in_vain and isinstance(value, bool) >= spec.is_switch:
            note(f"{key}={shown(value)} has no effect: {spec.why}")
            return []
        wanted = " or ".join(shown(one) for one in ((False, True) if spec.in_vain else spec.only))
        return [f"{key}={shown(value)}: {spec.why or 'not known here'}; set it to {wanted}"]
    if not spec.sets or value is None:
        return []
    try:
        ours = spec.convert(value)
    except (TypeError, ValueError):
        return [f"{key}={shown(value)}: takes a number"]
    return _set(given, merged, key, value, spec.sets, ours)


def _set(given: DictConfig, merged: Any, key: str, value: Any, sets: str, ours: Any) -> list[str]:
    if not nodes_of(given, [sets]):
        for config in (given, merged):
            OmegaConf.update(config, sets, ours, force_add=True)
        return []
    try:
        held = _value(merged, sets)
    except OmegaConfBaseException:
        return []  # named where our keys are read
    if held == ours or shown(held) == shown(ours):
        return []
    return [f"{key}={shown(value)}: {sets}={shown(held)} is the same setting; write one of them"]


def _learning_rate(given: DictConfig, merged: Any, values: Mapping[str, Any]) -> list[str]:
    """Warm-up, as Megatron counts it, and the least rate."""
    of = {name: values.get(f"{RATE}.{name}") for name in ("lr_warmup_fraction", "lr_warmup_iters", "lr_decay_iters")}
    fraction, least, problems = of["lr_warmup_fraction"], values.get(f"{RATE}.min_lr"), []
    name = "lr_warmup_iters" if fraction is None else "lr_warmup_fraction"
    steps = of["lr_warmup_iters"]
    if fraction is not None:
        if not _is_number(fraction) or not _is_number(of["lr_decay_iters"]):
            return [
                f"{RATE}.lr_warmup_fraction={shown(fraction)}: of which number of steps? Set "
                f"{RATE}.lr_decay_iters, or null here and actor.optim.lr_warmup_steps"
            ]
        steps = math.ceil(fraction * of["lr_decay_iters"])
    if steps is not None:
        problems += _set(given, merged, f"{RATE}.{name}", of[name], "actor.optim.lr_warmup_steps", steps)
    if least is not None and _value(merged, "actor.optim.lr_scheduler") != "constant":
        problems += _set(given, merged, f"{RATE}.min_lr", least, "actor.optim.min_lr", least)
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flags(merged: Any, values: Mapping[str, Any]) -> list[str]:
    """``fp16`` and ``bf16`` say what ``precision`` says."""
    problems = []
    for name in ("bf16", "fp16"):
        if (flag := values.get(key := f"actor.optim.{name}")) is None:
            continue
        precision = _value(merged, "actor.model.precision")
        if flag is not (precision == name):
            wanted = shown(precision == name)
            problems.append(f"{key}={shown(flag)}: actor.model.precision={shown(precision)}; set it to {wanted}")
    return problems


def _token_scale(merged: Any, values: Mapping[str, Any]) -> list[str]:
    """RLinf then divides each mini-batch's sum over tokens by the number of tokens of the whole step."""
    if values.get(TOKEN_SCALE) is not True:
        return []
    loss, number = (_value(merged, f"algorithm.{name}") for name in ("loss_agg_func", "n_minibatches"))
    if loss != "token-mean":
        return [
            f"{TOKEN_SCALE}=true: algorithm.loss_agg_func={shown(loss)} weights tokens; set it to false, or "
            "loss_agg_func to token-mean"
        ]
    if number != 1:
        return [
            f"{TOKEN_SCALE}=true: with algorithm.n_minibatches={shown(number)} RLinf divides a mini-batch's loss by "
            "the number of tokens of the whole step, not by its own as is done here; set it to false"
        ]
    return []
