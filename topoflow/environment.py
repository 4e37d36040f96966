"""The environment of this process: strict reading of launchers' variables, and defaults for torch's own."""

import os
from collections.abc import Iterable, Mapping, Sequence

from topoflow.errors import ConfigError

VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
CACHES = (
    "HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "MIOPEN_USER_DB_PATH", "MIOPEN_CUSTOM_CACHE_DIR",
)  # fmt: skip


def read_integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Return a variable as a number of 0 or more; the default, if there is one, where it is not set.

    Raises:
        ConfigError: it is no such number.
    """
    if default is not None and name not in environ:
        return default
    value = environ[name].strip()
    if not (value.isascii() and value.isdigit()):
        raise ConfigError(f"environment: {name}={environ[name]!r}: expected an integer of 0 or more")
    return int(value)


def require_complete(environ: Mapping[str, str], marks: Sequence[str], names: Sequence[str]) -> None:
    """Refuse an environment in which one of `marks` is set, and one of `names` is not."""
    missing = [name for name in names if name not in environ]
    if missing and any(name in environ for name in marks):
        present = ", ".join(name for name in dict.fromkeys([*marks, *names]) if name in environ)
        raise ConfigError(f"environment: {present} set without {', '.join(missing)}: expected all of them or none")


def require_consistent(environ: Mapping[str, str], condition: bool, one: str, other: str, expected: str) -> None:
    """Refuse an environment in which two variables contradict each other, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"environment: {one}={environ[one]} with {other}={environ[other]}: expected {expected}")


def select_variables(names: Iterable[str]) -> dict[str, str]:
    """Return those of `names` that are set in this process, with their values."""
    return {name: os.environ[name] for name in names if name in os.environ}


def forget_interface(name: str) -> None:
    """Remove a variable of INTERFACES from this process: with one that names no interface it could join no group."""
    assert name in INTERFACES, name
    os.environ.pop(name, None)


def silence_torch() -> None:
    """Suppress torch's C++ warnings, such as the stack of a lost connection. Call it before torch is imported."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def set_torch_defaults() -> None:
    """Set torch's variables for process groups, where the user has not."""
    for name, value in {
        # Connect gloo processes when they first communicate (torch 2.8 and later). By default all connect at once: n
        # open files a process, and n^2 requests to the store for their addresses.
        "TORCH_GLOO_LAZY_INIT": "1",
        # The watch ends hanging ranks and names the culprit. By default torch's watchdog ends the process at the first
        # error of NCCL, before the watch can. With 2 it aborts the communicators only (CleanUpOnly in torch's
        # ProcessGroupNCCL.hpp), so the main thread sees the error. Its heartbeat stays as a net beyond our limits.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "3600",
        "TORCH_FR_BUFFER_SIZE": "2000",  # records the last collectives, to be dumped at a stall
    }.items():
        os.environ.setdefault(name, value)
