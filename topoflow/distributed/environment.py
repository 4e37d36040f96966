"""The variables of the environment that decide how processes meet, compute and cache: what the doctor shows."""

import os
from collections.abc import Iterable, Mapping, MutableMapping

VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
CACHES = (
    "HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "MIOPEN_USER_DB_PATH", "MIOPEN_CUSTOM_CACHE_DIR",
)  # fmt: skip
_ASSIGNED_BY_SLURM = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
_NO_DEVICE = ("", "-1", "NoDevFiles")


def set_variables(names: Iterable[str], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Those of `names` that are set, with their values."""
    return {name: environ[name] for name in names if name in environ}


def assigned_devices(environ: Mapping[str, str] = os.environ) -> str | None:
    """The variable by which a launcher or a user gives GPUs to this process, as NAME=VALUE, if there is one."""
    for name in (*VISIBLE_DEVICES, *_ASSIGNED_BY_SLURM):
        if environ.get(name, "") not in _NO_DEVICE:
            return f"{name}={environ[name]}"
    return None


def forget_interface(name: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Take a variable of INTERFACES from this process: with one that names no interface it could join no group."""
    assert name in INTERFACES, name
    environ.pop(name, None)


def connect_when_needed(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let gloo connect two processes when they first speak, unless the user decides (torch 2.8 and later).

    At once, each connects with each: n open files a process, and n^2 requests to the store for their addresses.
    """
    environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
