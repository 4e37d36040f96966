"""Who this process is among the others: what the launcher's variables say."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from topoflow.distributed.slurm import expand_node_list, expand_tasks_per_node
from topoflow.errors import ConfigError


@dataclass(frozen=True)
class Launch:
    """What the environment says about this process."""

    launcher: str
    reason: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    job: str | None = None
    """Number of the SLURM job, under any launcher. torchrun's run id is no job: users choose it, and use it again."""
    restart: int = 0
    """How often SLURM has put the job back into its queue and started it again."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def read_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """The launcher's variables, as a `Launch`: torchrun's win over a SLURM step's; with neither, one process.

    A batch script or an salloc shell has SLURM variables too, but is no task of a step: it is one process.

    Raises:
        ConfigError: variables that are half set, not integers, or contradict each other.
    """
    _refuse_inherited_rank(environ)
    job = environ.get("SLURM_JOB_ID")
    restart = _integer(environ, "SLURM_RESTART_COUNT") if job and environ.get("SLURM_RESTART_COUNT") else 0
    return replace(_read_launcher(environ), job=job or None, restart=restart)


def _refuse_inherited_rank(environ: Mapping[str, str]) -> None:
    """A rank exported in the shell that calls srun reaches all tasks alike; torchrun gives one to each of its own."""
    if "TORCHELASTIC_RUN_ID" in environ or not _is_task_of_step(environ):
        return
    for name, of_step in (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")):
        if name in environ and _integer(environ, name) != _integer(environ, of_step):
            raise ConfigError(
                f"environment: {name}={environ[name]} in a task of a SLURM step with {of_step}={environ[of_step]}: "
                f"expected the same, or {name} not to be exported to srun"
            )


def _is_task_of_step(environ: Mapping[str, str]) -> bool:
    return all(name in environ for name in ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"))


def _read_launcher(environ: Mapping[str, str]) -> Launch:
    torchrun = [name for name in TORCHRUN_VARIABLES if name in environ]
    if len(torchrun) == len(TORCHRUN_VARIABLES):
        launch = Launch(
            launcher="torchrun",
            reason="RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set",
            rank=_integer(environ, "RANK"),
            world_size=_integer(environ, "WORLD_SIZE"),
            local_rank=_integer(environ, "LOCAL_RANK"),
            local_world_size=_integer(environ, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environ else 1,
            address=environ["MASTER_ADDR"],
            port=_integer(environ, "MASTER_PORT"),
        )
    elif any(name in environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        missing = ", ".join(name for name in TORCHRUN_VARIABLES if name not in environ)
        raise ConfigError(f"environment: {', '.join(torchrun)} set without {missing}: expected all of them or none")
    elif _is_task_of_step(environ):
        launch = _read_slurm_step(environ)
    else:
        inside = " (inside a SLURM job, but not a task of a step)" if "SLURM_JOB_ID" in environ else ""
        return Launch("single process", f"neither torchrun's variables nor a SLURM step's{inside}")
    if not 0 <= launch.rank < launch.world_size:
        raise ConfigError(f"environment: rank {launch.rank} with world size {launch.world_size}: expected a lower rank")
    return launch


def _read_slurm_step(environ: Mapping[str, str]) -> Launch:
    tasks_per_node = expand_tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    node = int(environ.get("SLURM_NODEID", "0"))
    if node >= len(tasks_per_node):
        raise ConfigError(f"environment: SLURM_NODEID={node} with tasks on {len(tasks_per_node)} nodes: expected less")
    nodes = expand_node_list(environ.get("SLURM_STEP_NODELIST", "localhost"))
    # ports 20000-51999 from job and step, so that two jobs on the same nodes do not collide
    job, step = _integer(environ, "SLURM_JOB_ID"), int(environ.get("SLURM_STEP_ID", "0"))
    return Launch(
        launcher="srun",
        reason=f"SLURM step {job}.{step} of {environ['SLURM_STEP_NUM_TASKS']} tasks",
        rank=_integer(environ, "SLURM_PROCID"),
        world_size=_integer(environ, "SLURM_STEP_NUM_TASKS"),
        local_rank=_integer(environ, "SLURM_LOCALID"),
        local_world_size=tasks_per_node[node],
        address=nodes[0],
        port=int(environ.get("MASTER_PORT", 20000 + (job * 37 + step) % 32000)),
    )


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ConfigError(f"environment: {name}={environ[name]!r}: expected an integer") from None
