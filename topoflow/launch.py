"""Who this process is among the others, as its launcher's variables tell: torchrun, srun or alone; and its device."""

import os
import re
import socket
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

from topoflow.errors import ConfigError

if TYPE_CHECKING:
    import torch


def read_integer(environ: Mapping[str, str], name: str) -> int:
    """A number of 0 or more.

    Raises:
        ConfigError: anything else.
    """
    value = environ[name].strip()
    if not (value.isascii() and value.isdigit()):
        raise ConfigError(f"environment: {name}={environ[name]!r}: expected an integer of 0 or more")
    return int(value)


def refuse_half_set(environ: Mapping[str, str], marks: Sequence[str], names: Sequence[str]) -> None:
    """If one of `marks` is set, all `names` must be.

    Raises:
        ConfigError: naming those that are set and those that are missing.
    """
    missing = [name for name in names if name not in environ]
    if missing and any(name in environ for name in marks):
        there = ", ".join(name for name in names if name in environ)
        raise ConfigError(f"environment: {there} set without {', '.join(missing)}: expected all of them or none")


STEP_MARKS = ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")
"""What a batch script and an salloc shell do not have; they have SLURM_PROCID or SLURM_NTASKS, for example."""
STEP_VARIABLES = (*STEP_MARKS, "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_ID", "SLURM_JOB_ID")


@dataclass(frozen=True)
class SlurmStep:
    """A step, and which of its tasks this process is. Nodes in the order of their numbers."""

    job: int
    step: int
    rank: int
    size: int
    local_rank: int
    node: int
    nodes: list[str]
    tasks_per_node: list[int]
    begins_on_first_node: bool
    """Whether rank 0 is on nodes[0]: always, but for an arbitrary distribution."""

    def __str__(self) -> str:
        """`SLURM step 17.2 of 8 tasks`."""
        return f"SLURM step {self.job}.{self.step} of {self.size} task{'s' * (self.size > 1)}"


def is_in_slurm_step(environ: Mapping[str, str]) -> bool:
    """Whether the environment is that of a task (a batch script's or an salloc shell's is not)."""
    return any(name in environ for name in STEP_MARKS)


def read_slurm_step(environ: Mapping[str, str]) -> SlurmStep:
    """The step whose task this process is.

    Raises:
        ConfigError: variables that are half set, not integers, or contradict each other.
    """
    refuse_half_set(environ, STEP_MARKS, STEP_VARIABLES)
    rank, size = read_integer(environ, "SLURM_PROCID"), read_integer(environ, "SLURM_STEP_NUM_TASKS")
    node = read_integer(environ, "SLURM_NODEID")
    step = SlurmStep(
        job=read_integer(environ, "SLURM_JOB_ID"),
        step=read_integer(environ, "SLURM_STEP_ID"),
        rank=rank,
        size=size,
        local_rank=read_integer(environ, "SLURM_LOCALID"),
        node=node,
        nodes=expand_node_list(environ["SLURM_STEP_NODELIST"]),
        tasks_per_node=expand_tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"]),
        begins_on_first_node=environ.get("SLURM_DISTRIBUTION") != "arbitrary" and (rank > 0 or node == 0),
    )
    _check(step, environ)
    return step


def _check(step: SlurmStep, environ: Mapping[str, str]) -> None:
    if sum(step.tasks_per_node) != step.size:
        raise _contradiction(environ, "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NUM_TASKS", "as many tasks in all")
    if len(step.nodes) != len(step.tasks_per_node):
        raise _contradiction(environ, "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "as many nodes")
    if step.rank >= step.size:
        raise _contradiction(environ, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "a lower rank")
    if step.node >= len(step.nodes):
        raise _contradiction(environ, "SLURM_NODEID", "SLURM_STEP_NODELIST", f"less than {len(step.nodes)} nodes")
    if step.local_rank >= step.tasks_per_node[step.node]:
        here = f"less than the {step.tasks_per_node[step.node]} tasks of node {step.node}"
        raise _contradiction(environ, "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", here)
    # sbatch, called inside a step, hands the variables of that step to the batch script, which has its own of these
    inherited = "the step's own (sbatch inside a step hands that step's on: unset them, or use srun launch/srun.sh)"
    if step.size > 1 and environ.get("SLURMD_NODENAME", step.nodes[0]) not in step.nodes:
        raise _contradiction(environ, "SLURMD_NODENAME", "SLURM_STEP_NODELIST", inherited)
    if "SLURM_GTIDS" in environ:
        ranks_here = environ["SLURM_GTIDS"].split(",")
        if str(step.rank) not in ranks_here or len(ranks_here) != step.tasks_per_node[step.node]:
            raise _contradiction(environ, "SLURM_GTIDS", "SLURM_STEP_TASKS_PER_NODE", inherited)


def _contradiction(environ: Mapping[str, str], one: str, other: str, expected: str) -> ConfigError:
    return ConfigError(f"environment: {one}={environ[one]} with {other}={environ[other]}: expected {expected}")


def expand_node_list(text: str) -> list[str]:
    """Host names of a SLURM node list, without asking scontrol: `nid[005001-005003,005010],login1`.

    Raises:
        ConfigError: not such a list.
    """
    parts = re.findall(r"(?:[^,\[\]\s]|\[[0-9,-]+\])+", text)
    if not parts or ",".join(parts) != text:
        raise _not_a_node_list(text)
    names: list[str] = []
    for part in parts:
        pieces = re.split(r"\[(.*?)\]", part)  # what is between brackets, and what is in them, in turn
        choices = [_expand_ranges(piece, text) if i % 2 else [piece] for i, piece in enumerate(pieces)]
        names += ["".join(chosen) for chosen in product(*choices)]
    return names


def _expand_ranges(numbers: str, text: str) -> list[str]:
    """`08-10,3` is 08, 09, 10, 3: as wide as the first of a range."""
    expanded: list[str] = []
    for item in numbers.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise _not_a_node_list(text)
        expanded += [str(n).zfill(len(match[1])) for n in range(int(match[1]), int(match[2] or match[1]) + 1)]
    return expanded


def _not_a_node_list(text: str) -> ConfigError:
    return ConfigError(f"environment: node list {text!r}: expected a form such as nid[005001-005003,005010],login1")


def expand_tasks_per_node(text: str) -> list[int]:
    """Tasks on each node from SLURM's short form: `4,2,1(x2)` is [4, 2, 1, 1].

    Raises:
        ConfigError: not such a form.
    """
    counts: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", item.strip())
        if match is None:
            raise ConfigError(f"environment: SLURM_STEP_TASKS_PER_NODE={text!r}: expected a form such as 4,2,1(x2)")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


@dataclass(frozen=True)
class Launch:
    """What the environment says about this process."""

    launcher: str
    reason: str
    """Why that launcher was believed."""
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
    """Where rank 0 waits for the others."""
    job: str | None = None
    """Number of the SLURM job, under any launcher. torchrun's run id is no job: users choose it, and use it again."""
    restart: int = 0
    """How often SLURM has put the job back into its queue and started it again."""
    idle_tasks: int = 0
    """For one process alone: how many more tasks the job has that it runs in."""
    job_nodes: int = 1
    """Nodes of the SLURM job."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def __str__(self) -> str:
        """`srun, 8 process(es) on 4 node(s), meeting at n1:20113`, or `single process, 1 process(es)`."""
        processes = f"{self.launcher}, {self.world_size} process(es)"
        if self.world_size == 1:
            return processes
        on_nodes = f" on {self.nodes} node(s)" if self.nodes > 0 else ""
        return f"{processes}{on_nodes}, meeting at {self.address}:{self.port}"


TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LOOPBACK = ("localhost", "127.", "::1")


def read_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """The launcher's variables, as a `Launch`: torchrun's win over a SLURM step's; with neither, one process.

    A batch script or an salloc shell has SLURM variables too, but is no task of a step: it is one process.

    Raises:
        ConfigError: variables that are half set, not integers, or contradict each other.
    """
    job = environ.get("SLURM_JOB_ID") or None
    restart = read_integer(environ, "SLURM_RESTART_COUNT") if job and environ.get("SLURM_RESTART_COUNT") else 0
    # torchrun may itself be the task of a step, which is no contradiction to what it says
    is_task = is_in_slurm_step(environ) and "TORCHELASTIC_RUN_ID" not in environ
    step = read_slurm_step(environ) if is_task else None
    if step is not None:
        _refuse_inherited_rank(environ, step)
    refuse_half_set(environ, ("RANK", "WORLD_SIZE", "LOCAL_RANK"), TORCHRUN_VARIABLES)
    refuse_half_set(environ, ("TORCHELASTIC_RUN_ID",), ("TORCHELASTIC_RUN_ID", *TORCHRUN_VARIABLES))
    _refuse_mpirun(environ, step)
    if "RANK" in environ:
        launch = _launch_of_torchrun(environ, step)
    elif step is not None:
        launch = _launch_of_step(environ, step, restart)
    else:
        launch = _launch_alone(environ, job)
    return replace(launch, job=job, restart=restart)


def _refuse_inherited_rank(environ: Mapping[str, str], step: SlurmStep) -> None:
    """A rank exported in the shell that calls srun reaches all tasks alike; torchrun gives one to each of its own."""
    for name, of_step, expected in (
        ("RANK", "SLURM_PROCID", step.rank),
        ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", step.size),
    ):
        if name in environ and read_integer(environ, name) != expected:
            raise ConfigError(
                f"environment: {name}={environ[name]} in a task of a SLURM step with {of_step}={expected}: "
                f"expected the same, or {name} not to be exported to srun"
            )


def _refuse_mpirun(environ: Mapping[str, str], step: SlurmStep | None) -> None:
    """Each of its processes would take itself for the only one."""
    size = environ.get("OMPI_COMM_WORLD_SIZE", "1")
    if size != "1" and "RANK" not in environ and (step is None or str(step.size) != size):
        raise ConfigError(
            f"environment: OMPI_COMM_WORLD_SIZE={size}: mpirun is no launcher of this program: "
            "expected srun launch/srun.sh or launch/torchrun.sh"
        )


def _launch_of_torchrun(environ: Mapping[str, str], step: SlurmStep | None) -> Launch:
    agent = "TORCHELASTIC_RUN_ID, " if "TORCHELASTIC_RUN_ID" in environ else ""
    over = ", which win over SLURM's" if is_in_slurm_step(environ) else ""
    local_rank = read_integer(environ, "LOCAL_RANK")
    if step is not None:
        _refuse_loopback(environ, step)
    launch = Launch(
        launcher="torchrun",
        reason=f"{agent}{', '.join(TORCHRUN_VARIABLES[:-1])} and {TORCHRUN_VARIABLES[-1]} are set{over}",
        rank=read_integer(environ, "RANK"),
        world_size=read_integer(environ, "WORLD_SIZE"),
        local_rank=local_rank,
        # only torchrun itself always sets it
        local_world_size=_read_or(environ, "LOCAL_WORLD_SIZE", local_rank + 1),
        node=_read_or(environ, "GROUP_RANK", step.node if step else 0),
        nodes=_read_or(environ, "GROUP_WORLD_SIZE", len(step.nodes) if step else 0),
        address=environ["MASTER_ADDR"],
        port=_read_port(environ),
    )
    for lower, higher in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if higher in environ and read_integer(environ, lower) >= read_integer(environ, higher):
            raise ConfigError(
                f"environment: {lower}={environ[lower]} with {higher}={environ[higher]}: expected a lower {lower}"
            )
    if launch.local_world_size > launch.world_size:
        raise ConfigError(
            f"environment: LOCAL_WORLD_SIZE={launch.local_world_size} with WORLD_SIZE={launch.world_size}: "
            "expected at most as many on a node as in all"
        )
    return launch


def _refuse_loopback(environ: Mapping[str, str], step: SlurmStep) -> None:
    address = environ.get("MASTER_ADDR", "")
    if len(step.nodes) > 1 and address.startswith(LOOPBACK):
        raise ConfigError(
            f"environment: MASTER_ADDR={address} in a SLURM step on {len(step.nodes)} nodes: expected the name of the "
            f"first, {step.nodes[0]}, or MASTER_ADDR not to be exported to srun"
        )


def _launch_of_step(environ: Mapping[str, str], step: SlurmStep, restart: int) -> Launch:
    address = environ.get("MASTER_ADDR", "")
    _refuse_loopback(environ, step)
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
        port=_read_port(environ) if "MASTER_PORT" in environ else port_of_step(step.job, step.step, restart),
        # an salloc shell can be a step of one task that was told of all the job's
        idle_tasks=_tasks_of_job(environ) - 1 if step.size == 1 else 0,
        job_nodes=_read_or(environ, "SLURM_JOB_NUM_NODES", 1),
    )


def _launch_alone(environ: Mapping[str, str], job: str | None) -> Launch:
    if environ.get("SLURM_PROCID", "0") != "0":
        raise ConfigError(
            f"environment: SLURM_PROCID={environ['SLURM_PROCID']} without SLURM_STEP_NUM_TASKS: "
            "expected all variables of the step, or none"
        )
    reason, tasks = "neither torchrun's variables nor a SLURM step's", _tasks_of_job(environ)
    if job is not None:
        reason = f"a batch script or shell of SLURM job {job}, no task of a step"
    if tasks > 1:
        reason += f", although the job has {tasks} tasks: srun launch/srun.sh starts as many"
    nodes = _read_or(environ, "SLURM_JOB_NUM_NODES", 1)
    return Launch("single process", reason, idle_tasks=tasks - 1, job_nodes=nodes)


def port_of_step(job: int, step: int, restart: int = 0) -> int:
    """A port from 20000 to 32762: below those that Linux gives to outgoing connections (from 32768).

    Any two steps of up to 113 jobs in a row have different ones (as long as step + restart is below 100): they may have
    the same first node. A restart has another one than the process that it replaces, which may live on for a while.
    """
    return 20000 + (113 * job + step + restart) % 12763


def _tasks_of_job(environ: Mapping[str, str]) -> int:
    """Also of a job that was sized by its nodes alone."""
    if "SLURM_NTASKS" not in environ and environ.get("SLURM_NTASKS_PER_NODE", "").isdecimal():
        return int(environ["SLURM_NTASKS_PER_NODE"]) * _read_or(environ, "SLURM_JOB_NUM_NODES", 1)
    return _read_or(environ, "SLURM_NTASKS", 1)


def _read_or(environ: Mapping[str, str], name: str, default: int) -> int:
    return read_integer(environ, name) if name in environ else default


def _read_port(environ: Mapping[str, str]) -> int:
    port = read_integer(environ, "MASTER_PORT")
    if not 0 < port < 65536:
        raise ConfigError(f"environment: MASTER_PORT={port}: expected 1 to 65535")
    return port


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


def choose_device(name: str, launch: Launch) -> "torch.device":
    """The device of this process: `cpu`, `cuda`, or `auto` for a GPU where there is one.

    With one visible device per task that device is index 0; with all visible, the index is the local rank. Whether
    others have the same one is not seen here: see `device_identity`.

    Raises:
        ConfigError: cuda without a GPU, more processes on a node than visible devices, or one process where a SLURM job
            has tasks and GPUs for more.
    """
    import torch  # here, so that launch scripts can read this module without waiting for torch

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


def device_identity(device: "torch.device") -> str:
    """What tells this device from all others of the machines of a run, by whatever index each process knows it.

    Empty where sharing it is no mistake (CPU), and where PyTorch cannot tell.
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
    """The variables that limit what is visible, in brackets; an empty value hides all devices."""
    limits = ", ".join(f"{name}={value!r}" for name, value in set_variables(VISIBLE_DEVICES).items())
    return f" ({limits})" if limits else ""
