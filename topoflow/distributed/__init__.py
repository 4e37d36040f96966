"""The processes of a run: who they are, and the few things that they say to each other.

Nothing else in the package reads a launcher's variables or calls a collective operation (DDP aside).
"""

from topoflow.distributed.context import Context, distributed_context
from topoflow.distributed.device import choose_device
from topoflow.distributed.launch import Launch, read_launch
from topoflow.distributed.roll_call import require_distinct_processes
from topoflow.distributed.slurm import expand_node_list, expand_tasks_per_node
from topoflow.distributed.verdict import Verdict

__all__ = [
    "Context",
    "Launch",
    "Verdict",
    "choose_device",
    "distributed_context",
    "expand_node_list",
    "expand_tasks_per_node",
    "read_launch",
    "require_distinct_processes",
]
