"""Which of the processes of a run this one is, by its launcher's variables (torchrun, srun, none), and its device."""

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
    """Where the ranks meet: rank 0's host."""
    has_agent_store: bool = False
    """torchrun's agent listens at the port, with a store for all."""
    attempt: int = 0
    """How often torchrun has started the ranks again."""
    error_file: str | None = None
    """Where torchrun reads why this rank failed."""
    job: str | None = None
    """Number of the SLURM job, under any launcher. torchrun's run id is no job: users choose it, and use it again."""
    restart: int = 0
    """How often SLURM has requeued and started the job again."""
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


_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_TORCHRUN = (*_RANKS, "MASTER_ADDR", "MASTER_PORT")
_STEP_MARKS = ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")
"""Set in the tasks of a step only. A batch script or an salloc shell has SLURM_PROCID and SLURM_NTASKS, for example."""
_STEP = (*_STEP_MARKS, "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_ID", "SLURM_JOB_ID")


def read_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Read the launcher's variables: torchrun's win over those of a SLURM step; with neither, it is one process.

    A batch script or an salloc shell has SLURM variables too, but is no task of a step: it is one process.

    Raises:
        ConfigError: variables that are half set, not integers, or contradict each other.
    """
    job = environ.get("SLURM_JOB_ID") or None
    restart = _integer(environ, "SLURM_RESTART_COUNT") if job and environ.get("SLURM_RESTART_COUNT") else 0
    in_step = any(name in environ for name in _STEP_MARKS)
    # torchrun may itself be the task of a step: its processes have other ranks than that task
    step = read_slurm_step(environ) if in_step and "TORCHELASTIC_RUN_ID" not in environ else None
    if step is not None:
        for name, variable, expected in (
            ("RANK", "SLURM_PROCID", step.rank),
            ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", step.size),
        ):
            if name in environ and _integer(environ, name) != expected:
                raise ConfigError(
                    f"environment: {name}={environ[name]} in a task of a SLURM step with {variable}={expected}: "
                    f"expected the same, or {name} not to be exported to srun"
                )
    _refuse_half_set(environ, _RANKS, _TORCHRUN)
    _refuse_half_set(environ, ("TORCHELASTIC_RUN_ID",), ("TORCHELASTIC_RUN_ID", *_TORCHRUN))
    # each process of mpirun would take itself for the only one
    size = environ.get("OMPI_COMM_WORLD_SIZE", "1")
    if size != "1" and "RANK" not in environ and (step is None or str(step.size) != size):
        raise ConfigError(
            f"environment: OMPI_COMM_WORLD_SIZE={size}: mpirun is no launcher of this program: "
            "expected srun launch/srun.sh or launch/torchrun.sh"
        )
    address = environ.get("MASTER_ADDR", "")
    if step is not None and len(step.nodes) > 1 and address.startswith(("localhost", "127.", "::1")):
        raise ConfigError(
            f"environment: MASTER_ADDR={address} in a SLURM step on {len(step.nodes)} nodes: expected the name of the "
            f"first, {step.nodes[0]}, or MASTER_ADDR not to be exported to srun"
        )
    if "RANK" in environ:
        launch = _launch_of_torchrun(environ, step, in_step)
    elif step is not None:
        launch = _launch_of_step(environ, step, restart)
    else:
        launch = _launch_alone(environ, job)
    return replace(launch, job=job, restart=restart)


def _launch_of_torchrun(environ: Mapping[str, str], step: "SlurmStep | None", in_step: bool) -> Launch:
    agent = "TORCHELASTIC_RUN_ID, " if "TORCHELASTIC_RUN_ID" in environ else ""
    over = ", which win over SLURM's" if in_step else ""
    local_rank = _integer(environ, "LOCAL_RANK")
    launch = Launch(
        launcher="torchrun",
        reason=f"{agent}{', '.join(_TORCHRUN[:-1])} and {_TORCHRUN[-1]} are set{over}",
        rank=_integer(environ, "RANK"),
        world_size=_integer(environ, "WORLD_SIZE"),
        local_rank=local_rank,
        # only torchrun itself always sets it
        local_world_size=_integer(environ, "LOCAL_WORLD_SIZE", local_rank + 1),
        node=_integer(environ, "GROUP_RANK", step.node if step else 0),
        nodes=_integer(environ, "GROUP_WORLD_SIZE", len(step.nodes) if step else 0),
        address=environ["MASTER_ADDR"],
        port=_port(environ),
        has_agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=_integer(environ, "TORCHELASTIC_RESTART_COUNT", 0),
        error_file=environ.get("TORCHELASTIC_ERROR_FILE"),
    )
    for lower, higher in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if higher in environ and _integer(environ, lower) >= _integer(environ, higher):
            raise _contradiction(environ, lower, higher, f"a lower {lower}")
    if launch.local_world_size > launch.world_size:
        raise _contradiction(environ, "LOCAL_WORLD_SIZE", "WORLD_SIZE", "at most as many on a node as in all")
    return launch


def _launch_of_step(environ: Mapping[str, str], step: "SlurmStep", restart: int) -> Launch:
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
        job_nodes=_integer(environ, "SLURM_JOB_NUM_NODES", 1),
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
    job_nodes = _integer(environ, "SLURM_JOB_NUM_NODES", 1)
    return Launch("single process", reason, idle_tasks=tasks - 1, job_nodes=job_nodes)


def port_of_step(job: int, step: int, restart: int = 0) -> int:
    """Return a port from 20000 to 32762: below those that Linux gives to outgoing connections (from 32768).

    Any two steps of up to 113 jobs in a row have different ones (as long as step + restart is below 100): they may have
    the same first node. A restart has another one than the process that it replaces, which may live for a while.
    """
    return 20000 + (113 * job + step + restart) % 12763


def _tasks_of_job(environ: Mapping[str, str]) -> int:
    """Return the tasks of the job, also where it was sized by its nodes alone."""
    if "SLURM_NTASKS" not in environ and environ.get("SLURM_NTASKS_PER_NODE", "").isdecimal():
        return int(environ["SLURM_NTASKS_PER_NODE"]) * _integer(environ, "SLURM_JOB_NUM_NODES", 1)
    return _integer(environ, "SLURM_NTASKS", 1)


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Return a variable as a number of 0 or more; the default where it is not set and there is one."""
    if default is not None and name not in environ:
        return default
    value = environ[name].strip()
    if not (value.isascii() and value.isdigit()):
        raise ConfigError(f"environment: {name}={environ[name]!r}: expected an integer of 0 or more")
    return int(value)


def _port(environ: Mapping[str, str]) -> int:
    port = _integer(environ, "MASTER_PORT")
    if not 0 < port < 65536:
        raise ConfigError(f"environment: MASTER_PORT={port}: expected 1 to 65535")
    return port


def _refuse_half_set(environ: Mapping[str, str], marks: Sequence[str], names: Sequence[str]) -> None:
    """Refuse an environment in which one of `marks` is set, and one of `names` is not."""
    missing = [name for name in names if name not in environ]
    if missing and any(name in environ for name in marks):
        present = ", ".join(name for name in names if name in environ)
        raise ConfigError(f"environment: {present} set without {', '.join(missing)}: expected all of them or none")


def _contradiction(environ: Mapping[str, str], one: str, other: str, expected: str) -> ConfigError:
    return ConfigError(f"environment: {one}={environ[one]} with {other}={environ[other]}: expected {expected}")


# ---- SLURM


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


def read_slurm_step(environ: Mapping[str, str]) -> SlurmStep:
    """Read the step whose task this process is.

    Raises:
        ConfigError: variables that are half set, not integers, or contradict each other.
    """
    _refuse_half_set(environ, _STEP_MARKS, _STEP)
    rank, size, node, local_rank, job, number = (
        _integer(environ, name)
        for name in (
            "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NODEID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID"
        )
    )  # fmt: skip
    nodes = expand_node_list(environ["SLURM_STEP_NODELIST"])
    tasks = expand_tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
    on_first = environ.get("SLURM_DISTRIBUTION") != "arbitrary" and (rank > 0 or node == 0)

    def require(condition: bool, one: str, other: str, expected: str) -> None:
        if not condition:
            raise _contradiction(environ, one, other, expected)

    require(sum(tasks) == size, "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NUM_TASKS", "as many tasks in all")
    require(len(nodes) == len(tasks), "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "as many nodes")
    require(rank < size, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "a lower rank")
    require(node < len(nodes), "SLURM_NODEID", "SLURM_STEP_NODELIST", f"less than {len(nodes)} nodes")
    here = f"less than the {tasks[node]} tasks of node {node}"
    require(local_rank < tasks[node], "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", here)
    # sbatch, called inside a step, hands the variables of that step to the batch script, which has its own of these
    inherited = "the step's own (sbatch inside a step hands that step's on: unset them, or use srun launch/srun.sh)"
    is_on_node = size == 1 or environ.get("SLURMD_NODENAME", nodes[0]) in nodes
    require(is_on_node, "SLURMD_NODENAME", "SLURM_STEP_NODELIST", inherited)
    ranks_here = environ["SLURM_GTIDS"].split(",") if "SLURM_GTIDS" in environ else [str(rank)] * tasks[node]
    is_on_list = str(rank) in ranks_here and len(ranks_here) == tasks[node]
    require(is_on_list, "SLURM_GTIDS", "SLURM_STEP_TASKS_PER_NODE", inherited)
    return SlurmStep(job, number, rank, size, local_rank, node, nodes, tasks, on_first)


def expand_node_list(text: str) -> list[str]:
    """Return the host names of a SLURM node list, without asking scontrol: `nid[005001-005003,005010],login1`.

    Raises:
        ConfigError: not such a list.
    """
    refusal = ConfigError(f"environment: node list {text!r}: expected a form such as nid[005001-005003,005010],login1")
    parts = re.findall(r"(?:[^,\[\]\s]|\[[0-9,-]+\])+", text)
    if not parts or ",".join(parts) != text:
        raise refusal
    names: list[str] = []
    for part in parts:
        choices: list[list[str]] = []
        for i, piece in enumerate(re.split(r"\[(.*?)\]", part)):  # what is between brackets, and what is in them
            choices.append([] if i % 2 else [piece])
            for item in piece.split(",") if i % 2 else ():
                match = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
                if match is None or int(match[2] or match[1]) < int(match[1]):
                    raise refusal
                # as wide as the first of a range: 08-10 is 08, 09, 10
                numbers = range(int(match[1]), int(match[2] or match[1]) + 1)
                choices[-1] += [str(number).zfill(len(match[1])) for number in numbers]
        names += ["".join(chosen) for chosen in product(*choices)]
    return names


def expand_tasks_per_node(text: str) -> list[int]:
    """Return the tasks on each node from SLURM's short form: `4,2,1(x2)` is [4, 2, 1, 1].

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


# ---- devices, and torch's own variables

VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
CACHES = (
    "HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "MIOPEN_USER_DB_PATH", "MIOPEN_CUSTOM_CACHE_DIR",
)  # fmt: skip


def set_variables(names: Iterable[str], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return those of `names` that are set, with their values."""
    return {name: environ[name] for name in names if name in environ}


def assigned_devices(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the variable by which a launcher or a user gives GPUs to this process, as NAME=VALUE, if there is one."""
    for name in (*VISIBLE_DEVICES, "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        if environ.get(name, "") not in ("", "-1", "NoDevFiles"):
            return f"{name}={environ[name]}"
    return None


def hosts_of_ranks(launch: Launch, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the host of each rank, if SLURM's variables tell it: only under srun, with ranks in blocks."""
    if launch.launcher != "srun":
        return []
    step = read_slurm_step(environ)
    in_blocks = environ.get("SLURM_DISTRIBUTION", "block").startswith("block") or max(step.tasks_per_node) == 1
    tasks = zip(step.nodes, step.tasks_per_node, strict=True)
    return [node for node, count in tasks for _ in range(count)] if in_blocks and step.begins_on_first_node else []


def forget_interface(name: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Take a variable of INTERFACES from this process: with one that names no interface it could join no group."""
    assert name in INTERFACES, name
    environ.pop(name, None)


def set_torch_defaults(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set torch's variables for process groups, where the user has not."""
    for name, value in {
        # gloo connects two processes when they first speak (torch 2.8 and later). At once, each connects with each: n
        # open files a process, and n^2 requests to the store for their addresses.
        "TORCH_GLOO_LAZY_INIT": "1",
        # The watch ends hanging ranks and names the culprit. By default torch's watchdog ends the process at the first
        # error of NCCL, before the watch can. With 2 it aborts the communicators only (CleanUpOnly in torch's
        # ProcessGroupNCCL.hpp), so the main thread sees the error. Its heartbeat stays, as a net, past our limits.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "3600",
        "TORCH_FR_BUFFER_SIZE": "2000",  # records the last collectives, for the dump at a stall
    }.items():
        environ.setdefault(name, value)


def choose_device(name: str, launch: Launch) -> "torch.device":
    """Return the device of this process: `cpu`, `cuda`, or `auto` for a GPU where there is one.

    With one visible device per task that device is index 0; with all visible, the index is the local rank. Whether
    others have the same one is not seen here: see `device_identity`.

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
            f"run.device: this process was given GPUs ({assigned}) and torch {torch.__version__} sees none: expected a "
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
    """Return what tells this device from all others of a run, by whatever index each process knows it.

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
    """Return the variables that limit what is visible, in brackets; an empty value hides all devices."""
    limits = ", ".join(f"{name}={value!r}" for name, value in set_variables(VISIBLE_DEVICES).items())
    return f" ({limits})" if limits else ""
