"""The ``critic`` section: the value model of PPO, its optimizer and how it is sharded."""

from __future__ import annotations

from pydantic import Field

from rlinf_lite.config.actor import FsdpConfig, ModelConfig, OptimConfig
from rlinf_lite.config.fields import Neutral, PathText, Precision, Section, follows


class CriticModelConfig(ModelConfig):
    """As `ModelConfig`; the critic begins with the policy's base weights unless set otherwise."""

    model_path: Neutral[PathText] = follows("actor.model.model_path")
    """A Hugging Face directory of a causal LM, or of a token classifier with one label. A value head that it does not
    hold begins as zeros."""
    model_type: Neutral[str | None] = follows("actor.model.model_type")
    """If set, the directory must hold this architecture (``llama``, ``qwen2.5``, ...)."""
    precision: Precision = follows("actor.model.precision")
    """Type of parameters and optimizer state, as ``actor.model.precision``."""


class CriticConfig(Section):
    use_critic_model: bool = False
    """Train a critic, for ``algorithm.adv_type=gae``."""
    group_name: Neutral[str] = "CriticGroup"
    """Name of the critic workers in logs."""
    model: CriticModelConfig = Field(default_factory=CriticModelConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    fsdp_config: FsdpConfig = Field(default_factory=FsdpConfig)
