"""Who this process is among the others: what the launcher's variables say."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from topoflow.distributed.slurm import SlurmStep, is_in_slurm_step, read_slurm_step
from topoflow.distributed.variables import read_integer, refuse_half_set
from topoflow.errors import ConfigError


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
