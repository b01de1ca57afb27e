"""The config of a run: one file per section, each limit at its field. `build` makes one, `check` compares its keys."""

from rlinf_lite.config.actor import (
    ActorConfig,
    FsdpConfig,
    GradScalerConfig,
    MegatronConfig,
    MixedPrecisionConfig,
    ModelConfig,
    OptimConfig,
    TokenizerConfig,
)
from rlinf_lite.config.algorithm import AlgorithmConfig, SamplingConfig
from rlinf_lite.config.cluster import ClusterConfig
from rlinf_lite.config.critic import CriticConfig
from rlinf_lite.config.data import ArithmeticConfig, DataConfig, ReasoningGymConfig
from rlinf_lite.config.evaluation import EvalConfig
from rlinf_lite.config.identity import flatten, to_yaml
from rlinf_lite.config.load import build, build_evaluation
from rlinf_lite.config.reward import RewardConfig, RewardFunctionConfig
from rlinf_lite.config.rollout import RolloutConfig, RolloutModelConfig
from rlinf_lite.config.rules import check
from rlinf_lite.config.runner import CheckpointConfig, KeepBestConfig, LoggerConfig, RunnerConfig, seconds_of
from rlinf_lite.config.schema import Config, keys, known_keys
from rlinf_lite.config.suggestions import nearest
from rlinf_lite.errors import ConfigError

__all__ = [
    "ActorConfig",
    "AlgorithmConfig",
    "ArithmeticConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "CriticConfig",
    "DataConfig",
    "EvalConfig",
    "FsdpConfig",
    "GradScalerConfig",
    "KeepBestConfig",
    "LoggerConfig",
    "MegatronConfig",
    "MixedPrecisionConfig",
    "ModelConfig",
    "OptimConfig",
    "ReasoningGymConfig",
    "RewardConfig",
    "RewardFunctionConfig",
    "RolloutConfig",
    "RolloutModelConfig",
    "RunnerConfig",
    "SamplingConfig",
    "TokenizerConfig",
    "build",
    "build_evaluation",
    "check",
    "flatten",
    "keys",
    "known_keys",
    "nearest",
    "seconds_of",
    "to_yaml",
]
