"""Damage checkpoint files one byte at a time, and count the damages that loading does not find."""

import logging
import random
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from topoflow.checkpoint.directory import CheckpointDirectory
from topoflow.checkpoint.file import read_checkpoint
from topoflow.config import CheckpointConfig
from topoflow.errors import ResumeRefused
from topoflow.launch import Launch
from topoflow.ranks import Context
from topoflow.resume import keep_or_forget_best
from topoflow.train_state import TrainProgress

KINDS = ("flip", "truncation", "deletion")


@dataclass
class Row:
    """How many damages of one kind to one file were made, found, and refused by plain torch.load."""

    file: str
    kind: str
    damages: int = 0
    found: int = 0
    noticed_by_torch: int = 0


def damage_each(source: Path, work: Path, flips: int, others: int, seed: int) -> list[Row]:
    """Damage a copy of the checkpoint folder `source` at `work`, again and again, and count what loading finds.

    Args:
        flips: bytes to change; every second one chooses a file first, so that small files get their share.
        others: truncations and deletions.
    """
    shutil.copytree(source, work)
    directory = CheckpointDirectory(work)
    newest = directory.folder(directory.steps()[-1])
    pointers = [name for name in ("last", "best") if (work / name).exists()]
    files = {name: newest / name for name in ("state.pt", "manifest.json")} | {name: work / name for name in pointers}
    rows: dict[tuple[str, str], Row] = {}
    for name, kind, content in draw_damages(files, flips, others, random.Random(seed)):
        row, file = rows.setdefault((name, kind), Row(name, kind)), files[name]
        whole = file.read_bytes()
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        row.damages += 1
        row.noticed_by_torch += name == "state.pt" and not loads_in_torch(file)
        row.found += is_pointer_found(directory, file) if name in pointers else is_found(directory, newest, file)
        file.write_bytes(whole)
    path, _ = directory.newest_whole(strict=True)
    assert path == newest, "every damage was undone"
    return sorted(rows.values(), key=lambda row: (KINDS.index(row.kind), list(files).index(row.file)))


def draw_damages(
    files: dict[str, Path], flips: int, others: int, draw: random.Random
) -> Iterator[tuple[str, str, bytes | None]]:
    """Yield file, kind and damaged content (None: delete the file). A flip changes one byte to any other value."""
    contents = {name: path.read_bytes() for name, path in files.items()}
    names, sizes = list(files), [len(content) for content in contents.values()]
    for number in range(flips):
        name = draw.choices(names, sizes)[0] if number % 2 == 0 else draw.choice(names)
        damaged = bytearray(contents[name])
        damaged[draw.randrange(len(damaged))] ^= draw.randrange(1, 256)
        yield name, "flip", bytes(damaged)
    for number in range(others):
        name = names[number % len(names)]
        is_gone = number // len(names) % 3 == 0
        length = draw.randrange(len(contents[name]))
        yield name, "deletion" if is_gone else "truncation", None if is_gone else contents[name][:length]


def is_found(directory: CheckpointDirectory, newest: Path, file: Path) -> bool:
    """Return whether loading `newest`, or the run it belongs to, is refused, and whether resume=auto skips it."""
    for load in (lambda: read_checkpoint(newest), lambda: directory.newest_whole(strict=True)):
        try:
            load()
            return False
        except ResumeRefused as refusal:
            if file.name not in str(refusal):
                return False
    with logged_warnings() as logged:
        path, _ = directory.newest_whole()
    return path != newest and any(f"{newest}: {file.name}" in line for line in logged)


def is_pointer_found(directory: CheckpointDirectory, pointer: Path) -> bool:
    """Return whether following the damaged pointer is refused (or finds nothing), and a resume names it."""
    try:
        is_refused = directory.pointer(pointer.name) is None and not pointer.exists()
    except ResumeRefused as refusal:
        is_refused = str(pointer) in str(refusal)
    with logged_warnings() as logged:
        _, state = directory.newest_whole()
        one_process = Context(Launch("none", "a test"), torch.device("cpu"))
        keep_or_forget_best(TrainProgress(**state["progress"]), directory, CheckpointConfig(), one_process)
    return is_refused and any(str(pointer) in line for line in logged)


@contextmanager
def logged_warnings() -> Iterator[list[str]]:
    """Collect the messages that the program logs at warning level or above inside the block."""
    logged: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: logged.append(record.getMessage())
    log = logging.getLogger("topoflow")
    log.addHandler(handler)
    try:
        yield logged
    finally:
        log.removeHandler(handler)


def loads_in_torch(path: Path) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001 (damaged bytes may raise any exception)
        return False
    return True
