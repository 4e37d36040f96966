"""What SLURM tells a task about its step; its short forms are expanded without asking scontrol."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from topoflow.distributed.variables import read_integer, refuse_half_set
from topoflow.errors import ConfigError

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
