"""Which device is this process's."""

import socket

import torch

from topoflow.distributed.environment import VISIBLE_DEVICES, set_variables
from topoflow.distributed.launch import Launch
from topoflow.errors import ConfigError


def choose_device(name: str, launch: Launch) -> torch.device:
    """The device of this process: `cpu`, `cuda`, or `auto` for a GPU where there is one.

    With one visible device per task that device is index 0; with all visible, the index is the local rank. Whether
    others have the same one is not seen here: see `device_identity`.

    Raises:
        ConfigError: cuda without a GPU, more processes on a node than visible devices, or one process where a SLURM job
            has tasks and GPUs for more.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise ConfigError(
            f"run.device: 'cuda' is not usable: no GPU is visible to this process{_limits()}: expected cpu or auto"
        )
    if launch.idle_tasks > 0 and (count > 1 or launch.job_nodes > 1):
        raise ConfigError(
            f"environment: one process with {count} visible device(s){_limits()} in a SLURM job with "
            f"SLURM_NTASKS={launch.idle_tasks + 1} on {launch.job_nodes} node(s): expected srun launch/srun.sh CONFIG "
            "(for one process, srun --ntasks=1 launch/srun.sh CONFIG; or run.device=cpu)"
        )
    if count > 1 and max(launch.local_rank + 1, launch.local_world_size) > count:
        raise ConfigError(
            f"environment: local rank {launch.local_rank} of {launch.local_world_size} with {count} visible devices"
            f"{_limits()} on {socket.gethostname()}: expected one process per device, or one visible to each"
        )
    return torch.device("cuda", 0 if count == 1 else launch.local_rank)


def device_identity(device: torch.device) -> str:
    """What tells this device from all others of the machines of a run, by whatever index each process knows it.

    Empty where sharing it is no mistake (CPU), and where PyTorch cannot tell.
    """
    if device.type != "cuda":
        return ""
    properties = torch.cuda.get_device_properties(device)
    uuid = str(properties.uuid)
    # of two devices in one package (MI250X) and of slices of one device (MIG) at least one of the two differs
    pci = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]  # not in every PyTorch
    if None in pci:
        return uuid if uuid.strip("0-") else ""
    return f"{uuid} at {pci[0]:04x}:{pci[1]:02x}:{pci[2]:02x} on {socket.gethostname()}"


def _limits() -> str:
    """The variables that limit what is visible, in brackets; an empty value hides all devices."""
    limits = ", ".join(f"{name}={value!r}" for name, value in set_variables(VISIBLE_DEVICES).items())
    return f" ({limits})" if limits else ""
