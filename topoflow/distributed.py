"""The processes of a run: who they are, and the few things that they say to each other.

Nothing else in the package reads a launcher's variables or calls a collective operation (DDP aside).
"""

import os
import re
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from topoflow import errors
from topoflow.config import DistributedConfig
from topoflow.errors import ConfigError, RanksDisagree, Refusal


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
    elif "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ and "SLURM_LOCALID" in environ:
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


def expand_node_list(text: str) -> list[str]:
    """Host names of a SLURM node list, without asking scontrol: `nid[005001-005003,005010],login1`."""
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        expanded = [""]
        for literal, bracket in re.findall(r"([^\[]*)(?:\[([^\]]*)\])?", part):
            choices = [literal + number for number in _expand_ranges(bracket)] if bracket else [literal]
            expanded = [prefix + choice for prefix in expanded for choice in choices]
        names += expanded
    if not names:
        raise ConfigError(f"environment: node list {text!r}: expected host names")
    return names


def _expand_ranges(text: str) -> list[str]:
    numbers = []
    for item in text.split(","):
        first, _, last = item.partition("-")
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return numbers


def expand_tasks_per_node(text: str) -> list[int]:
    """Tasks on each node from SLURM's short form: `4,2,1(x2)` is [4, 2, 1, 1]."""
    counts: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item.strip())
        if match is None:
            raise ConfigError(f"environment: SLURM_STEP_TASKS_PER_NODE={text!r}: expected a form such as 4,2,1(x2)")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def choose_device(name: str, launch: Launch) -> torch.device:
    """The device of this process: `cpu`, `cuda`, or `auto` for a GPU where there is one.

    With one visible device per task that device is index 0; with all visible, the index is the local rank.

    Raises:
        ConfigError: cuda without a GPU, or more processes on a node than visible devices.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise ConfigError("run.device: 'cuda' is not usable: no GPU is visible to this process: expected cpu or auto")
    if count > 1 and launch.local_rank >= count:
        raise ConfigError(
            f"environment: local rank {launch.local_rank} with {count} visible devices on {socket.gethostname()}: "
            "expected at most one process per device"
        )
    return torch.device("cuda", 0 if count == 1 else launch.local_rank)


class Context:
    """This process among the others. With one process every operation is trivial and no group exists."""

    def __init__(self, launch: Launch, device: torch.device):
        self.launch, self.device = launch, device
        self.rank, self.world_size, self.is_main = launch.rank, launch.world_size, launch.is_main

    def gather_objects(self, item: Any) -> list[Any]:
        """`item` of every process, in the order of ranks, on every process (pickled, over the host)."""
        if self.world_size == 1:
            return [item]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, item)
        return gathered

    def broadcast_object(self, item: Any) -> Any:
        """Rank 0's `item` on every process (pickled, over the host)."""
        if self.world_size == 1:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def broadcast_tensor(self, tensor: torch.Tensor) -> None:
        """Overwrite `tensor` by rank 0's, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=0)

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all processes, in place; returned for convenience."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, ...] of each process -> [world_size * n, ...] in the order of ranks, on every process."""
        if self.world_size == 1:
            return rows
        gathered = rows.new_empty((self.world_size * rows.shape[0], *rows.shape[1:]))
        dist.all_gather(list(gathered.chunk(self.world_size)), rows.contiguous())
        return gathered

    @contextmanager
    def together(self, phase: str) -> Iterator[None]:
        """What one process refuses here, all refuse with the same message, so that none waits for another.

        Raises:
            Refusal: of the first process that raised one; if not all said the same, the message names its rank.
        """
        refusal = None
        try:
            yield
        except Refusal as error:
            refusal = error
        said = self.gather_objects(None if refusal is None else (type(refusal).__name__, str(refusal)))
        refused = [(rank, *item) for rank, item in enumerate(said) if item is not None]
        if not refused:
            return
        rank, kind, message = refused[0]
        alike = len(refused) == self.world_size and len({text for _, _, text in refused}) == 1
        who = "" if alike or self.world_size == 1 else f"rank {rank}, {phase}: "
        shared = getattr(errors, kind)(who + message)
        shared.shared = True
        raise shared from refusal

    def require_same(self, digests: Mapping[str, str], what: str) -> None:
        """Prove that `digests` {name: hash} are equal on all processes.

        Raises:
            RanksDisagree: naming the first name that differs and the ranks that differ from rank 0.
        """
        gathered = self.gather_objects(dict(digests))
        for name in sorted({name for item in gathered for name in item}):
            odd = [rank for rank, item in enumerate(gathered) if item.get(name) != gathered[0].get(name)]
            if odd:
                ranks = ", ".join(map(str, odd))
                refusal = RanksDisagree(f"{what}: {name} differs between rank 0 and rank(s) {ranks}")
                refusal.shared = True
                raise refusal


class _WithUnusedParameter(nn.Module):
    """A model, and beside it a parameter that no forward pass uses: DDP then keeps its buckets, and keeps silent."""

    def __init__(self, model: nn.Module, device: torch.device):
        super().__init__()
        self.model = model
        self.unused = nn.Parameter(torch.zeros(1, device=device))

    def forward(self, *arguments: torch.Tensor | None) -> torch.Tensor:
        return self.model(*arguments)


def wrap_for_training(model: nn.Module, context: Context) -> nn.Module:
    """The model as it is called in training: DDP around it, or itself where there is one process.

    After the first backward pass DDP re-orders its buckets, unless it looks for unused parameters; a resumed run would
    then add gradients in another order than one that never stopped, and on more than two ranks differ in the last
    bits. So it looks for them, and finds one (without any, it warns on every rank). Buffers are sent once, not at each
    step.
    """
    if context.world_size == 1:
        return model
    for buffer in model.buffers():
        context.broadcast_tensor(buffer)
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # torch 2.6 knows no other name
    return nn.parallel.DistributedDataParallel(
        _WithUnusedParameter(model, context.device),
        device_ids=[context.device.index] if context.device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=True,
    )


@contextmanager
def distributed_context(launch: Launch, config: DistributedConfig, device: torch.device) -> Iterator[Context]:
    """Join the process group of the launch (none for one process), leave it at the end.

    Raises:
        RanksDisagree: not all processes arrived within `distributed.setup_timeout_seconds`.
    """
    context = Context(launch, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launch.world_size == 1:
        yield context
        return
    _join(launch, config, device)
    try:
        yield context
    finally:
        dist.destroy_process_group()


def _join(launch: Launch, config: DistributedConfig, device: torch.device) -> None:
    # Host tensors and objects go over gloo beside the devices' own backend.
    on_device = {"auto": "nccl" if device.type == "cuda" else "gloo"}.get(config.backend, config.backend)
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,cuda:{on_device}"
    if device.type == "cpu" and on_device == "nccl":
        raise ConfigError("distributed.backend: 'nccl' is not usable on CPU: expected gloo or auto")
    setup = timedelta(seconds=config.setup_timeout_seconds)
    url = "env://" if launch.launcher == "torchrun" else f"tcp://{launch.address}:{launch.port}"
    try:
        store, _, _ = next(dist.rendezvous(url, launch.rank, launch.world_size, timeout=setup))
        store.set_timeout(setup)
        dist.init_process_group(
            backend,
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timedelta(seconds=config.timeout_seconds),
        )
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise RanksDisagree(
            f"set-up: rank {launch.rank} of {launch.world_size} on {socket.gethostname()} did not meet the others at "
            f"{launch.address}:{launch.port} within {config.setup_timeout_seconds:g} s: {str(error).splitlines()[0]}"
        ) from None
