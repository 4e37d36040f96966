"""The processes of a run: who they are, and the few things that they say to each other.

Nothing else in the package reads a launcher's variables or calls a collective operation (DDP aside).
"""

import hashlib
import os
import re
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

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

    def exchange(self, partner: int, sent: torch.Tensor, received: torch.Tensor) -> None:
        """Send one tensor to the process `partner` while it sends one here, which overwrites `received`."""
        operations = [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, received, partner)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

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

    def require_same(self, values: Mapping[str, str], what: str) -> None:
        """Prove that `values` {name: what is held} are equal on all processes; only their hash travels if they are.

        Raises:
            RanksDisagree: naming the first name that differs, and the ranks that differ from most others.
        """
        text = "\n".join(f"{name}={values[name]}" for name in sorted(values))
        digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.int64)
        rows = self.gather_rows(digest.unsqueeze(0).to(self.device))
        if (rows == rows[0]).all():
            return
        gathered = self.gather_objects(dict(values))
        for name in sorted({name for held in gathered for name in held}):
            held = [values.get(name) for values in gathered]
            usual, times = Counter(held).most_common(1)[0]
            if times < self.world_size:
                odd = ", ".join(str(rank) for rank, value in enumerate(held) if value != usual)
                most = f"from {times} others" if times > 1 else "from every other"
                refusal = RanksDisagree(f"{what}: {name} differs on rank(s) {odd} {most}")
                refusal.shared = True
                raise refusal


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


def require_distinct_ranks(store: dist.Store, launch: Launch) -> None:
    """Prove that no two of the processes that meet at `store` have the same rank: the first to come asks all others.

    Raises:
        ConfigError: on every process, naming two that have.
    """
    number = store.add("arrived", 1) - 1
    store.set(f"process {number}", f"{launch.rank} process {os.getpid()} on {socket.gethostname()}")
    if number == 0:
        processes: dict[str, str] = {}
        refusal = ""
        for other in range(launch.world_size):
            rank, _, who = store.get(f"process {other}").decode().partition(" ")
            if rank in processes:
                refusal = f"environment: rank {rank} is that of {processes[rank]} and of {who}: expected one of each"
            processes[rank] = who
        store.set("refusal", refusal)
    refusal = store.get("refusal").decode()
    if refusal:
        error = ConfigError(refusal)
        error.shared = True
        raise error


def _join(launch: Launch, config: DistributedConfig, device: torch.device) -> None:
    # Host tensors and objects go over gloo beside the devices' own backend.
    on_device = {"auto": "nccl" if device.type == "cuda" else "gloo"}.get(config.backend, config.backend)
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,cuda:{on_device}"
    if device.type == "cpu" and on_device == "nccl":
        raise ConfigError("distributed.backend: 'nccl' is not usable on CPU: expected gloo or auto")
    if device.type == "cuda" and on_device == "gloo" and config.reduction == "canonical":
        raise ConfigError("distributed.backend: 'gloo' sends nothing between GPUs one by one: expected nccl or auto")
    setup = timedelta(seconds=config.setup_timeout_seconds)
    url = "env://" if launch.launcher == "torchrun" else f"tcp://{launch.address}:{launch.port}"
    try:
        store, _, _ = next(dist.rendezvous(url, launch.rank, launch.world_size, timeout=setup))
        store.set_timeout(setup)
        require_distinct_ranks(dist.PrefixStore("topoflow", store), launch)
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
