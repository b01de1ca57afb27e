"""Values that are accepted but rarely intended; the run prints a note for each at the start."""

from __future__ import annotations

from collections.abc import Iterator

from rlinf_lite.config.algorithm import AlgorithmConfig
from rlinf_lite.config.schema import Config


def unusual_values(config: Config) -> Iterator[str]:
    """A line for each unusual value: the key, the value, and what follows from it."""
    optim = config.actor.optim
    if optim.lr == 0:
        yield "actor.optim.lr=0.0: nothing will be learned"
    elif optim.lr > 0.01:
        yield f"actor.optim.lr={optim.lr}: Adam moves each weight by about that much per step; 1e-6 to 1e-3 is usual"
    if optim.total_training_steps is not None and optim.lr_warmup_steps >= optim.total_training_steps:
        yield (
            f"actor.optim.lr_warmup_steps={optim.lr_warmup_steps}: no step is left after it of "
            f"actor.optim.total_training_steps={optim.total_training_steps}"
        )
    if optim.weight_decay > 1:
        yield f"actor.optim.weight_decay={optim.weight_decay}: 0 to 0.1 is usual"
    yield from _unusual_loss(config.algorithm)


def _unusual_loss(algorithm: AlgorithmConfig) -> Iterator[str]:
    for name, value in (
        ("ratio_clip_eps", algorithm.ratio_clip_eps),
        ("clip_ratio_low", algorithm.clip_ratio_low),
        ("clip_ratio_high", algorithm.clip_ratio_high),
    ):
        if value == 0:
            yield f"algorithm.{name}=0.0: only the first optimizer step of a batch moves in that direction"
        elif value is not None and value >= 1 and algorithm.loss_type != "cispo":  # which clips a weight, at 5 or so
            yield f"algorithm.{name}={value}: almost nothing is clipped; 0.1 to 0.4 is usual (0.2, not 20 %)"
    if algorithm.loss_type == "gspo" and min(_clip_range(algorithm)) > 0.05:
        yield (
            "algorithm.loss_type=gspo: its ratio is a mean over a response, which stays near 1, so that a clip of "
            f"{min(_clip_range(algorithm))} is wide; clip_ratio_low=0.0003 and clip_ratio_high=0.0004 are usual"
        )
    if algorithm.kl_beta > 1:
        yield f"algorithm.kl_beta={algorithm.kl_beta}: the KL term outweighs the reward; 0.001 to 0.1 is usual"
    if algorithm.entropy_bonus > 0.1:
        yield f"algorithm.entropy_bonus={algorithm.entropy_bonus}: outweighs the reward; at most 0.01 is usual"
    if algorithm.sampling_params.temperature > 2:
        yield (
            f"algorithm.sampling_params.temperature={algorithm.sampling_params.temperature}: responses are nearly "
            "random; 0.6 to 1.2 is usual"
        )


def _clip_range(algorithm: AlgorithmConfig) -> list[float]:
    given = (algorithm.clip_ratio_low, algorithm.clip_ratio_high)
    return [algorithm.ratio_clip_eps if value is None else value for value in given]
