"""Floor 0: the settings of a run, as frozen dataclasses, one per concern; stdlib and annotated-types only.

One field is one kohya flag, in the same spelling; the string under a field is its help text and its line in
`docs/options.md`; its range and what it needs stand beside its type (`rules.py`). `None` means "not set". Values are
checked when a record is made; keys, types, and settings that would do nothing at the border (`cli/flags.py`).
"""

from sfumato.config import relations, rules
from sfumato.config.data import DataConfig, DatasetConfig, SubsetConfig
from sfumato.config.embedding import EmbeddingConfig
from sfumato.config.hub import HubConfig
from sfumato.config.memory import MemoryConfig
from sfumato.config.metadata import MetadataConfig
from sfumato.config.run import (
    FOLLOWING,
    Config,
    FamilyOptions,
    LogConfig,
    LossConfig,
    Method,
    ModelConfig,
    NetworkConfig,
    NoiseConfig,
    OptimizerConfig,
    OutputConfig,
    SampleConfig,
    Settings,
    TrainConfig,
)
from sfumato.config.validation import ValidationConfig

rules.check_names(Settings, rules.hints(Settings), (*relations.IDLE, *relations.CLASHES))

__all__ = [
    "FOLLOWING",
    "Config",
    "DataConfig",
    "DatasetConfig",
    "EmbeddingConfig",
    "FamilyOptions",
    "HubConfig",
    "LogConfig",
    "LossConfig",
    "MemoryConfig",
    "MetadataConfig",
    "Method",
    "ModelConfig",
    "NetworkConfig",
    "NoiseConfig",
    "OptimizerConfig",
    "OutputConfig",
    "SampleConfig",
    "Settings",
    "SubsetConfig",
    "TrainConfig",
    "ValidationConfig",
]
