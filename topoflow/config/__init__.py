"""The configuration: its schema, and how it is read, written and compared."""

from topoflow.config.loading import (
    ADDS_NAMES,
    changed_on_resume,
    config_from_dict,
    config_to_dict,
    dump_config,
    load_config,
    override_config,
)
from topoflow.config.schema import (
    PARAMETER_GROUPS,
    CheckpointConfig,
    Config,
    DataConfig,
    DistributedConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "ADDS_NAMES",
    "PARAMETER_GROUPS",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DistributedConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "TrainConfig",
    "changed_on_resume",
    "config_from_dict",
    "config_to_dict",
    "dump_config",
    "load_config",
    "override_config",
]
