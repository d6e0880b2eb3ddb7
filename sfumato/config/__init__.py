"""Floor 0: what a run is told, as frozen dataclasses, one a concern; stdlib only.

One field is one kohya flag, in the same spelling; the string under a field is its help text and its
line in `docs/options.md`. `None` means "not set". Validation of types and of keys happens at the
border (`cli/flags.py`), never here.
"""

from sfumato.config.data import DataConfig, DatasetConfig, SubsetConfig
from sfumato.config.run import (
    Config,
    LogConfig,
    LossConfig,
    MemoryConfig,
    Method,
    ModelConfig,
    NetworkConfig,
    NoiseConfig,
    OptimizerConfig,
    OutputConfig,
    SampleConfig,
    TrainConfig,
)

__all__ = [
    "Config",
    "DataConfig",
    "DatasetConfig",
    "LogConfig",
    "LossConfig",
    "MemoryConfig",
    "Method",
    "ModelConfig",
    "NetworkConfig",
    "NoiseConfig",
    "OptimizerConfig",
    "OutputConfig",
    "SampleConfig",
    "SubsetConfig",
    "TrainConfig",
]
