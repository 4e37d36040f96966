"""What the system allows each process: open files, and the memory that loader processes share."""

import functools
import os
import resource
from pathlib import Path

from topoflow.config import Config
from topoflow.data.dataset import input_names
from topoflow.tools.doctor.amounts import show_bytes
from topoflow.tools.doctor.report import FAIL, WARNING, Check
from topoflow.tools.doctor.survey import Survey, values

SHARED_MEMORY = Path("/dev/shm")
_OWN_FILES = 128
"""Files that one process has open by itself: libraries, logs, stores, devices."""
_FILES_PER_WORKER = 24
"""Pipes and queues of a loader process, and the tensors of the two batches that it prepares ahead."""
_NCCL_BYTES = 64 * 2**20
"""Shared memory that NCCL takes for a process on a GPU, at its defaults."""


def check_limits(survey: Survey, config: Config, grid_shape: tuple[int, int]) -> Check:
    """Open files and shared memory suffice for data.workers, the batch and the number of processes."""
    context, workers = survey.context, config.data.workers
    files = _OWN_FILES + workers * _FILES_PER_WORKER
    on_gpu = context.device.type == "cuda"
    share = workers * 2 * batch_bytes(config, grid_shape) + (_NCCL_BYTES if on_gpu else 0)
    answers = survey.ask_ranks(functools.partial(describe_limits, needs_shared_memory=share > 0))
    said = values(answers)
    check = Check("limits", findings=list(survey.failures(answers)))
    for rank, found in said.items():
        # rank 0 has two sockets for each process, and raises its soft limit for them
        kind, needed = ("hard_open_files", files + 2 * context.world_size) if rank == 0 else ("open_files", files)
        if found[kind] < 2 * needed:
            text = (
                f"at most {found[kind]} open files a process, about {needed} are needed for {context.world_size}"
                f" process(es) and data.workers={workers}: raise it (ulimit -n {max(4096, 4 * needed)})"
            )
            check.findings.append(survey.finding(FAIL if found[kind] < needed else WARNING, rank, text))
    for node, ranks in survey.ranks_of.items():
        if ranks[0] not in said:
            continue
        free, needed = said[ranks[0]]["shared_memory_bytes"], share * len(ranks)
        check.note(node, open_files=min(said[rank]["open_files"] for rank in ranks if rank in said))
        check.note(node, shared_memory_bytes=free, shared_memory_needed_bytes=needed)
        if free is not None and free < 2 * needed:
            text = (
                f"{SHARED_MEMORY} has {show_bytes(free)} free, about {show_bytes(needed)} are needed for batches of "
                f"data.workers={workers} in {len(ranks)} process(es): enlarge it, or lower data.workers"
            )
            verdict = FAIL if free < needed else WARNING
            check.findings.append(survey.finding(verdict, ranks[0], text, whole_node=True))
    least = min((found["open_files"] for found in said.values()), default=0)
    check.summary = f"{least} open files a process (about {files} needed)"
    if share:
        free = min((figures["shared_memory_bytes"] or 0 for figures in check.figures.values()), default=0)
        needed = max((figures["shared_memory_needed_bytes"] for figures in check.figures.values()), default=0)
        check.summary += f"; {SHARED_MEMORY} {show_bytes(free)} free (about {show_bytes(needed)} needed)"
    return check


def describe_limits(needs_shared_memory: bool) -> dict:
    """open_files, hard_open_files: the limits; shared_memory_bytes: what is free, None where it is not asked for."""
    limits = [
        2**31 if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    ]
    free = None
    if needs_shared_memory:
        status = os.statvfs(SHARED_MEMORY)
        free = status.f_bavail * status.f_frsize
    return {"open_files": limits[0], "hard_open_files": limits[1], "shared_memory_bytes": free}


def batch_bytes(config: Config, grid_shape: tuple[int, int]) -> int:
    """What one micro-batch takes: inputs and targets in float32, which of them count, and the wind."""
    wind = 2 if config.model.wind != "none" else 0
    per_cell = 4 * (len(input_names(config.data)) + wind) + 5 * len(config.data.targets)
    return config.train.micro_batch_size * per_cell * grid_shape[0] * grid_shape[1]
