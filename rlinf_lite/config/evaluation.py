"""The config of an evaluation: those keys of a run's config that it depends on."""

from __future__ import annotations

from pydantic import Field

from rlinf_lite.config.actor import ModelConfig, TokenizerConfig
from rlinf_lite.config.algorithm import ValidationSamplingConfig
from rlinf_lite.config.cluster import Device, Threads
from rlinf_lite.config.data import DataConfig
from rlinf_lite.config.fields import Count, Section, Seed
from rlinf_lite.config.reward import RewardConfig
from rlinf_lite.config.rollout import RolloutConfig


class EvalClusterConfig(Section):
    device: Device = "auto"
    threads_per_worker: Threads = 1
    deterministic: bool = True


class EvalSamplingConfig(ValidationSamplingConfig):
    """As in a run, but the length of responses does not follow that of training."""

    max_new_tokens: Count = 1024


class EvalAlgorithmConfig(Section):
    val_sampling_params: EvalSamplingConfig = Field(default_factory=EvalSamplingConfig)


class EvalActorConfig(Section):
    seed: Seed = 1234
    model: ModelConfig = Field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)


class EvalConfig(Section):
    """Keys have the names and meanings of a run's."""

    cluster: EvalClusterConfig = Field(default_factory=EvalClusterConfig)
    algorithm: EvalAlgorithmConfig = Field(default_factory=EvalAlgorithmConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    actor: EvalActorConfig = Field(default_factory=EvalActorConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)

    @property
    def seq_length(self) -> int:
        """Largest number of tokens in a prompt and its response together."""
        return self.data.max_prompt_length + self.algorithm.val_sampling_params.max_new_tokens
