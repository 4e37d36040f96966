"""Which device is this process's."""

import socket

import torch

from topoflow.distributed.launch import Launch
from topoflow.errors import ConfigError


def choose_device(name: str, launch: Launch) -> torch.device:
    """The device of this process: `cpu`, `cuda`, or `auto` for a GPU where there is one.

    With one visible device per task that device is index 0; with all visible, the index is the local rank.

    Raises:
        ConfigError: cuda without a GPU, or more processes on a node than visible devices.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise ConfigError("run.device: 'cuda' is not usable: no GPU is visible to this process: expected cpu or auto")
    if count > 1 and launch.local_rank >= count:
        raise ConfigError(
            f"environment: local rank {launch.local_rank} with {count} visible devices on {socket.gethostname()}: "
            "expected at most one process per device"
        )
    return torch.device("cuda", 0 if count == 1 else launch.local_rank)
