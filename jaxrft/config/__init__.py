"""Typed configs: dataclasses, YAML and overrides. Imports neither JAX nor any other room."""

from jaxrft.config.algorithm import AlgorithmConfig
from jaxrft.config.base import ConfigError, Section
from jaxrft.config.rl import RLConfig
from jaxrft.config.rollout import RolloutConfig, VLLMConfig
from jaxrft.config.rooms import (
    AuditConfig,
    BatchingConfig,
    DataConfig,
    EvaluationConfig,
    MemoryConfig,
    ModelConfig,
    ParallelConfig,
    RewardsConfig,
    TrackingConfig,
    WarmStartConfig,
    WatchdogConfig,
)

__all__ = [
    "AlgorithmConfig",
    "AuditConfig",
    "BatchingConfig",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "MemoryConfig",
    "ModelConfig",
    "ParallelConfig",
    "RLConfig",
    "RewardsConfig",
    "RolloutConfig",
    "Section",
    "TrackingConfig",
    "VLLMConfig",
    "WarmStartConfig",
    "WatchdogConfig",
]
