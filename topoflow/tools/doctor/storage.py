"""The run directory: room, speed, and whether all nodes see the same one. It is left as it was."""

import fcntl
import functools
import os
import secrets
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from topoflow.tools.doctor.amounts import show_bytes, show_rate
from topoflow.tools.doctor.folder import BriefFolder, nearest_folder, write_durably
from topoflow.tools.doctor.report import FAIL, WARNING, Check
from topoflow.tools.doctor.survey import Survey, values

BLOCK_BYTES, MOST_BYTES, MOST_SECONDS = 4 * 2**20, 32 * 2**20, 3.0
PATIENCE_SECONDS = 3.0
"""How long a node may take to see a file that another has written (network file systems cache folders)."""
SLOW_SHARE = 0.25
"""A node that writes at less than this share of the median stands out."""


@dataclass(frozen=True)
class Meeting:
    """What rank 0 left for all others to find: the folder, the words in its file `token`, and what locking it said."""

    folder: Path
    token: str
    lock_error: str | None


def check_storage(survey: Survey, run_dir: Path, checkpoint_bytes: int, checkpoints_kept: int) -> Check:
    """Free space, write speed, one file system on all nodes, and locks that reach from node to node.

    checkpoint_bytes: what one checkpoint takes; checkpoints_kept: how many there are at most at a time.
    """
    context, check = survey.context, Check("run directory")
    with BriefFolder().kept() as brief, ExitStack() as held:
        left = survey.ask_ranks(lambda: leave_token(run_dir, brief, held) if context.is_main else None)[0]
        if left.error is not None:
            check.findings.append(survey.finding(FAIL, 0, left.error, whole_node=True))
            check.summary = f"{run_dir}: rank 0 cannot make a file there; not examined on other nodes"
            return check
        meeting = left.value
        looks = survey.ask_nodes(functools.partial(examine_folder, run_dir, meeting, context.rank))
        names = [f"node-{rank}" for rank, found in values(looks).items() if found["sees"]]
        unseen = survey.ask_ranks(lambda: missing_files(meeting.folder, names) if context.is_main else None)[0]
        survey.ask_ranks(brief.remove)
    found = values(looks)
    check.findings += [*survey.failures(looks, whole_node=True), *survey.failures([unseen])]
    for rank, look in found.items():
        measured = {name: look[name] for name in ("free_bytes", "write_bytes_per_second") if name in look}
        check.note(survey.node_of[rank], **measured, sees_run_directory=look["sees"])
    _judge_sight(survey, check, found, unseen.value or [], meeting.folder.parent)
    _judge_locks(survey, check, found, meeting.lock_error)
    _judge_room(survey, check, found, checkpoint_bytes, checkpoints_kept)
    _judge_speed(survey, check, found)
    wanted, here = run_dir.absolute(), meeting.folder.parent
    check.summary = f"{here}" if here == wanted else f"{wanted} is not there yet: examined {here}"
    if found:
        free, rates = min(look["free_bytes"] for look in found.values()), _rates(found).values()
        check.summary += f"; {show_bytes(free)} free, a checkpoint takes {show_bytes(checkpoint_bytes)}"
        check.summary += f"; written with fsync, all nodes at once: {show_rate(min(rates))} or more" if rates else ""
    return check


def leave_token(run_dir: Path, brief: BriefFolder, held: ExitStack) -> Meeting:
    """Make the folder and the token, and lock the token until `held` closes."""
    folder, token, error = brief.make(nearest_folder(run_dir)), secrets.token_hex(16), None
    write_durably(folder / "token", token.encode())
    file = held.enter_context((folder / "token").open("rb"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as refused:
        error = refused.strerror
    return Meeting(folder, token, error)


def examine_folder(run_dir: Path, meeting: Meeting, rank: int) -> dict:
    """Plain values: whether this node sees rank 0's token, its room, its speed, and whether the lock reaches it.

    Raises:
        OSError: the file system refuses something.
    """
    folder = nearest_folder(run_dir)
    found = {"sees": False, "folder": str(folder), "free_bytes": free_bytes(folder)}
    token = folder / meeting.folder.name / "token"
    if not _wait_until(token.is_file) or token.read_text() != meeting.token:
        return found
    found["sees"] = True
    if rank > 0:
        with token.open("rb") as file:
            found["lock"] = try_lock(file)
    found["write_bytes_per_second"] = measure_write(token.with_name(f"node-{rank}"))
    return found


def free_bytes(folder: Path) -> int:
    """Room in a file system for users."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def try_lock(file: BinaryIO) -> str:
    """What came of locking a file that another node holds locked: `held`, `taken` (now both have it), or the error."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held"
    except OSError as error:
        return error.strerror
    return "taken"


def measure_write(path: Path) -> float:
    """Bytes in a second that reach the disk or the server: written in blocks, then fsync."""
    block, written, start = secrets.token_bytes(BLOCK_BYTES), 0, time.monotonic()  # nothing that could be compressed
    with path.open("xb") as file:
        while written < MOST_BYTES and time.monotonic() - start < MOST_SECONDS:
            written += file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return written / (time.monotonic() - start)


def missing_files(folder: Path, names: list[str]) -> list[str]:
    """Those of `names` that do not come into sight."""
    return [name for name in names if not _wait_until((folder / name).is_file)]


def _wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _judge_sight(survey: Survey, check: Check, found: dict[int, dict], unseen: list[str], folder: Path) -> None:
    for rank, look in found.items():
        text = None
        if not look["sees"] and Path(look["folder"]) != folder:
            text = f"there is no {folder} (nearest: {look['folder']}): mount the same file system on all nodes"
        elif not look["sees"]:
            text = f"{folder} is not that of rank 0, whose file is not in it: expected one file system for all nodes"
        elif f"node-{rank}" in unseen:
            text = f"what is written to {folder} does not come into rank 0's sight: expected one file system"
        if text is not None:
            check.findings.append(survey.finding(FAIL, rank, text, whole_node=True))


def _judge_locks(survey: Survey, check: Check, found: dict[int, dict], lock_error: str | None) -> None:
    guarded = "a process that lost the run directory is kept out by the lease's generation alone"
    if lock_error is not None:
        check.findings.append(survey.finding(WARNING, 0, f"no flock here ({lock_error}): {guarded}", whole_node=True))
        return
    for rank, look in found.items():
        if look.get("lock", "held") != "held":
            said = "another node's flock is not seen" if look["lock"] == "taken" else f"no flock ({look['lock']})"
            text = f"{said} here: {guarded}; mount with cluster-wide locks (Lustre: -o flock)"
            check.findings.append(survey.finding(WARNING, rank, text, whole_node=True))


def _judge_room(survey: Survey, check: Check, found: dict[int, dict], checkpoint_bytes: int, kept: int) -> None:
    for rank, look in found.items():
        free, needed = look["free_bytes"], checkpoint_bytes * kept
        if free < needed:
            each = show_bytes(checkpoint_bytes)
            text = f"{show_bytes(free)} free: a checkpoint takes {each}, there are up to {kept} at a time: make room"
            verdict = FAIL if free < checkpoint_bytes else WARNING
            check.findings.append(survey.finding(verdict, rank, text, whole_node=True))


def _judge_speed(survey: Survey, check: Check, found: dict[int, dict]) -> None:
    rates = _rates(found)
    usual = statistics.median(rates.values()) if rates else 0.0
    for rank, rate in rates.items():
        if rate < SLOW_SHARE * usual:
            text = f"writes {show_rate(rate)}, the median node {show_rate(usual)}: look at its mount and its network"
            check.findings.append(survey.finding(WARNING, rank, text, whole_node=True))


def _rates(found: dict[int, dict]) -> dict[int, float]:
    return {rank: look["write_bytes_per_second"] for rank, look in found.items() if "write_bytes_per_second" in look}
