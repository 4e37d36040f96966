"""A SLURM step as one of its tasks sees it, read from that task's variables."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from topoflow.environment import read_integer, require_complete, require_consistent
from topoflow.errors import ConfigError

_STEP_MARKS = ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")
"""Set in the tasks of a step only. A batch script or an salloc shell has SLURM_PROCID and SLURM_NTASKS, for example."""
_STEP = (*_STEP_MARKS, "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_ID", "SLURM_JOB_ID")


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
    """Whether rank 0 is on nodes[0]: always, except for an arbitrary distribution."""
    in_blocks: bool
    """Whether each node has consecutive ranks, after those of the node before it."""

    def __str__(self) -> str:
        """Return `SLURM step 17.2 of 8 tasks`."""
        return f"SLURM step {self.job}.{self.step} of {self.size} task{'s' * (self.size > 1)}"

    def hosts_of_ranks(self) -> list[str]:
        """Return the host of each rank; an empty list where the variables do not tell."""
        if not (self.in_blocks and self.begins_on_first_node):
            return []
        return [node for node, tasks in zip(self.nodes, self.tasks_per_node, strict=True) for _ in range(tasks)]


def is_slurm_task(environ: Mapping[str, str]) -> bool:
    """Return whether these are the variables of a task of a step, and not of a batch script or an salloc shell."""
    return any(name in environ for name in _STEP_MARKS)


def read_slurm_step(environ: Mapping[str, str]) -> SlurmStep:
    """Read the step whose task this process is.

    Raises:
        ConfigError: variables that are half set, not integers, or contradict each other.
    """
    require_complete(environ, _STEP_MARKS, _STEP)
    rank, size, node, local_rank, job, number = (
        read_integer(environ, name)
        for name in (
            "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NODEID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID"
        )
    )  # fmt: skip
    nodes = expand_node_list(environ["SLURM_STEP_NODELIST"])
    tasks = expand_tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])

    def require(condition: bool, one: str, other: str, expected: str) -> None:
        require_consistent(environ, condition, one, other, expected)

    require(sum(tasks) == size, "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NUM_TASKS", "as many tasks in total")
    require(len(nodes) == len(tasks), "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "as many nodes")
    require(rank < size, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "a lower rank")
    require(node < len(nodes), "SLURM_NODEID", "SLURM_STEP_NODELIST", f"less than {len(nodes)} nodes")
    here = f"less than the {tasks[node]} tasks of node {node}"
    require(local_rank < tasks[node], "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", here)
    # sbatch, called inside a step, hands the variables of that step to the batch script, which has its own of these
    inherited = "the step's own (sbatch inside a step passes on that step's: unset them, or use srun launch/srun.sh)"
    is_on_node = size == 1 or environ.get("SLURMD_NODENAME", nodes[0]) in nodes
    require(is_on_node, "SLURMD_NODENAME", "SLURM_STEP_NODELIST", inherited)
    ranks_here = environ["SLURM_GTIDS"].split(",") if "SLURM_GTIDS" in environ else [str(rank)] * tasks[node]
    is_on_list = str(rank) in ranks_here and len(ranks_here) == tasks[node]
    require(is_on_list, "SLURM_GTIDS", "SLURM_STEP_TASKS_PER_NODE", inherited)

    distribution = environ.get("SLURM_DISTRIBUTION", "block")
    begins_on_first_node = distribution != "arbitrary" and (rank > 0 or node == 0)
    in_blocks = distribution.startswith("block") or max(tasks) == 1
    return SlurmStep(job, number, rank, size, local_rank, node, nodes, tasks, begins_on_first_node, in_blocks)


def port_of_step(job: int, step: int, restart: int = 0) -> int:
    """Return a port from 20000 to 32762: below those that Linux gives to outgoing connections (from 32768).

    Any two steps of up to 113 jobs in a row have different ones (as long as step + restart is below 100): they may have
    the same first node. A restart has another port than the process that it replaces, which may still run.
    """
    return 20000 + (113 * job + step + restart) % 12763


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
