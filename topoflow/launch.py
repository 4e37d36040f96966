"""Rank and device of this process, from its launcher's variables (torchrun, srun, none)."""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from topoflow.environment import (
    VISIBLE_DEVICES,
    read_integer,
    require_complete,
    require_consistent,
    select_variables,
)
from topoflow.errors import ConfigError
from topoflow.slurm import SlurmStep, is_slurm_task, port_of_step, read_slurm_step

if TYPE_CHECKING:
    import torch

# ---- torchrun, srun, or one process


@dataclass(frozen=True)
class Launch:
    """What the environment tells about this process."""

    launcher: str
    reason: str
    """Why that launcher was chosen."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Number of this process among those of its node."""
    local_world_size: int = 1
    node: int = 0
    nodes: int = 1
    """0: not known."""
    address: str = "127.0.0.1"
    port: int = 0
    """Host of rank 0, where the ranks connect."""
    has_agent_store: bool = False
    """Whether torchrun's agent listens at the port, with a store for all ranks."""
    attempt: int = 0
    """How often torchrun has started the ranks again."""
    error_file: str | None = None
    """File from which torchrun reads why this rank failed."""
    job: str | None = None
    """Number of the SLURM job, under any launcher. torchrun's run id is not a job: users choose and reuse it."""
    restart: int = 0
    """How often SLURM has requeued and started the job again."""
    idle_tasks: int = 0
    """For a single process: number of other tasks of its SLURM job."""
    job_nodes: int = 1
    """Nodes of the SLURM job."""
    hosts: Sequence[str] = ()
    """Host of each rank, where SLURM's variables tell it."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def __str__(self) -> str:
        """Return `srun, 8 process(es) on 4 node(s), meeting at n1:20113`, or `single process, 1 process(es)`."""
        processes = f"{self.launcher}, {self.world_size} process(es)"
        if self.world_size == 1:
            return processes
        on_nodes = f" on {self.nodes} node(s)" if self.nodes > 0 else ""
        return f"{processes}{on_nodes}, meeting at {self.address}:{self.port}"


_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_TORCHRUN = (*_RANKS, "MASTER_ADDR", "MASTER_PORT")


def read_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Read the launcher's variables: torchrun's override those of a SLURM step; with neither, it is a single process.

    A batch script or an salloc shell has SLURM variables too, but is not a task of a step: it is a single process.

    Raises:
        ConfigError: variables that are half set, not integers, or contradict each other.
    """
    job = environ.get("SLURM_JOB_ID") or None
    restart = read_integer(environ, "SLURM_RESTART_COUNT") if job and environ.get("SLURM_RESTART_COUNT") else 0
    in_step = is_slurm_task(environ)
    # torchrun may itself be the task of a step: its processes have other ranks than that task
    step = read_slurm_step(environ) if in_step and "TORCHELASTIC_RUN_ID" not in environ else None
    if step is not None:
        _require_not_inherited(environ, step)
    require_complete(environ, (*_RANKS, "TORCHELASTIC_RUN_ID"), _TORCHRUN)
    # each process of mpirun would think that it is the only one
    size = environ.get("OMPI_COMM_WORLD_SIZE", "1")
    if size != "1" and "RANK" not in environ and (step is None or str(step.size) != size):
        raise ConfigError(
            f"environment: OMPI_COMM_WORLD_SIZE={size}: mpirun is not supported as a launcher: "
            "expected srun launch/srun.sh or launch/torchrun.sh"
        )
    if "RANK" in environ:
        launch = _launch_of_torchrun(environ, step, in_step)
    elif step is not None:
        launch = _launch_of_step(environ, step, restart)
    else:
        launch = _launch_alone(environ, job)
    return replace(launch, job=job, restart=restart)


def _require_not_inherited(environ: Mapping[str, str], step: SlurmStep) -> None:
    """Refuse variables of torchrun that the batch shell exported to a task that they do not describe."""
    for name, variable, expected in (
        ("RANK", "SLURM_PROCID", step.rank),
        ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", step.size),
    ):
        is_same = name not in environ or read_integer(environ, name) == expected
        require_consistent(environ, is_same, name, variable, f"the same, or {name} not exported to srun")
    is_reachable = len(step.nodes) == 1 or not environ.get("MASTER_ADDR", "").startswith(("localhost", "127.", "::1"))
    first = f"the first of the {len(step.nodes)} nodes, {step.nodes[0]}, or MASTER_ADDR not exported to srun"
    require_consistent(environ, is_reachable, "MASTER_ADDR", "SLURM_STEP_NODELIST", first)


def _launch_of_torchrun(environ: Mapping[str, str], step: SlurmStep | None, in_step: bool) -> Launch:
    agent = "TORCHELASTIC_RUN_ID, " if "TORCHELASTIC_RUN_ID" in environ else ""
    over = ", which take precedence over SLURM's" if in_step else ""
    local_rank = read_integer(environ, "LOCAL_RANK")
    launch = Launch(
        launcher="torchrun",
        reason=f"{agent}{', '.join(_TORCHRUN[:-1])} and {_TORCHRUN[-1]} are set{over}",
        rank=read_integer(environ, "RANK"),
        world_size=read_integer(environ, "WORLD_SIZE"),
        local_rank=local_rank,
        # only torchrun itself always sets it
        local_world_size=read_integer(environ, "LOCAL_WORLD_SIZE", local_rank + 1),
        node=read_integer(environ, "GROUP_RANK", step.node if step else 0),
        nodes=read_integer(environ, "GROUP_WORLD_SIZE", len(step.nodes) if step else 0),
        address=environ["MASTER_ADDR"],
        port=_port(environ),
        has_agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=read_integer(environ, "TORCHELASTIC_RESTART_COUNT", 0),
        error_file=environ.get("TORCHELASTIC_ERROR_FILE"),
    )
    for lower, higher in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        is_lower = higher not in environ or read_integer(environ, lower) < read_integer(environ, higher)
        require_consistent(environ, is_lower, lower, higher, f"a lower {lower}")
    fits = launch.local_world_size <= launch.world_size
    require_consistent(environ, fits, "LOCAL_WORLD_SIZE", "WORLD_SIZE", "at most as many on a node as in total")
    return launch


def _launch_of_step(environ: Mapping[str, str], step: SlurmStep, restart: int) -> Launch:
    address = environ.get("MASTER_ADDR", "")
    if not address and step.size > 1 and not step.begins_on_first_node:
        raise ConfigError(
            "environment: a SLURM step with an arbitrary distribution (SLURM_DISTRIBUTION=arbitrary, or rank 0 not on "
            "SLURM_NODEID=0): expected another, or MASTER_ADDR to name the host of rank 0"
        )
    chosen = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name in environ]
    return Launch(
        launcher="srun",
        reason=f"{step}{', with ' + ' and '.join(chosen) if chosen else ''}",
        rank=step.rank,
        world_size=step.size,
        local_rank=step.local_rank,
        local_world_size=step.tasks_per_node[step.node],
        node=step.node,
        nodes=len(step.nodes),
        address=address or step.nodes[0],
        port=_port(environ) if "MASTER_PORT" in environ else port_of_step(step.job, step.step, restart),
        # an salloc shell can be a step of one task that was told of all the job's
        idle_tasks=_tasks_of_job(environ) - 1 if step.size == 1 else 0,
        job_nodes=read_integer(environ, "SLURM_JOB_NUM_NODES", 1),
        hosts=step.hosts_of_ranks(),
    )


def _launch_alone(environ: Mapping[str, str], job: str | None) -> Launch:
    if environ.get("SLURM_PROCID", "0") != "0":
        raise ConfigError(
            f"environment: SLURM_PROCID={environ['SLURM_PROCID']} without SLURM_STEP_NUM_TASKS: "
            "expected all variables of the step, or none"
        )
    reason, tasks = "neither torchrun's variables nor a SLURM step's", _tasks_of_job(environ)
    if job is not None:
        reason = f"a batch script or shell of SLURM job {job}, not a task of a step"
    if tasks > 1:
        reason += f", although the job has {tasks} tasks: srun launch/srun.sh starts that many"
    job_nodes = read_integer(environ, "SLURM_JOB_NUM_NODES", 1)
    return Launch("single process", reason, idle_tasks=tasks - 1, job_nodes=job_nodes)


def _tasks_of_job(environ: Mapping[str, str]) -> int:
    """Return the number of tasks of the job, also if only its number of nodes was requested."""
    if "SLURM_NTASKS" not in environ and environ.get("SLURM_NTASKS_PER_NODE", "").isdecimal():
        return int(environ["SLURM_NTASKS_PER_NODE"]) * read_integer(environ, "SLURM_JOB_NUM_NODES", 1)
    return read_integer(environ, "SLURM_NTASKS", 1)


def _port(environ: Mapping[str, str]) -> int:
    port = read_integer(environ, "MASTER_PORT")
    if not 0 < port < 65536:
        raise ConfigError(f"environment: MASTER_PORT={port}: expected 1 to 65535")
    return port


# ---- the device


def assigned_devices() -> str | None:
    """Return the variable that assigns GPUs to this process as NAME=VALUE, if there is one."""
    for name, value in select_variables((*VISIBLE_DEVICES, "SLURM_STEP_GPUS", "SLURM_JOB_GPUS")).items():
        if value not in ("", "-1", "NoDevFiles"):
            return f"{name}={value}"
    return None


def choose_device(name: str, launch: Launch) -> "torch.device":
    """Return the device of this process: `cpu`, `cuda`, or `auto` for a GPU where there is one.

    With one visible device per task that device is index 0; with all visible, the index is the local rank. Whether
    another process has the same device is checked with `device_identity`.

    Raises:
        ConfigError: a GPU was asked for or assigned and torch sees none, more processes on a node than visible devices,
            or one process where a SLURM job has tasks and GPUs for more.
    """
    import torch  # here, so that launch scripts can read this module without waiting for torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    assigned = assigned_devices()
    if name == "cpu" or (name == "auto" and count == 0 and assigned is None):
        return torch.device("cpu")
    if count == 0 and name == "auto":
        raise ConfigError(
            f"run.device: this process was given GPUs ({assigned}) but torch {torch.__version__} sees none: expected a "
            "torch built for them and a driver, or run.device=cpu to train without"
        )
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


def device_identity(device: "torch.device") -> str:
    """Return an identifier of this device that is unique in a run, whatever index a process has for it.

    Empty if processes may share it (CPU), or if PyTorch cannot identify it.
    """
    if device.type != "cuda":
        return ""
    import torch

    properties = torch.cuda.get_device_properties(device)
    uuid = str(properties.uuid)
    # of two devices in one package (MI250X) and of slices of one device (MIG) at least one of the two differs
    pci = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]  # not in every PyTorch
    if None in pci:
        return uuid if uuid.strip("0-") else ""
    return f"{uuid} at {pci[0]:04x}:{pci[1]:02x}:{pci[2]:02x} on {socket.gethostname()}"


def _limits() -> str:
    """Return the variables that limit what is visible, in brackets; an empty value hides all devices."""
    limits = ", ".join(f"{name}={value!r}" for name, value in select_variables(VISIBLE_DEVICES).items())
    return f" ({limits})" if limits else ""
