"""Damage the checkpoints of a run, one byte at a time, and count the damages that loading did not find.

    python -m benchmarks.flip_campaign [RUN] [--flips 1000] [--others 100] [--seed 0]

RUN is copied, not changed; without it a small run of train.py is made. Half of the flips fall on bytes drawn from all
files alike, the other half first draw a file: state.pt, manifest.json, `last` or `best`. `others` are truncations and
deletions. Each damage is judged in three ways, as the program reads: by its path it must be refused, `resume=auto` must
take an older checkpoint or (for a pointer) warn, and both must name the damaged file. Beside it stands how many of
the damaged state.pt plain torch.load refuses. Ends with status 1 if a damage was not found.
"""

import argparse
import logging
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

import train
from topoflow.checkpoint.directory import CheckpointDirectory
from topoflow.checkpoint.file import read_checkpoint
from topoflow.config import CheckpointConfig
from topoflow.errors import ResumeRefused
from topoflow.launch import Launch
from topoflow.ranks import Context
from topoflow.resume import keep_or_forget_best
from topoflow.tools.demo.world import make_demo_data
from topoflow.train_state import TrainProgress

CONFIG = {
    "run": {"threads": 1},
    "data": {
        "train": [["2018-10-01", "2018-10-03"]],
        "validation": [["2018-10-04", "2018-10-05"]],
        "lead_times_hours": [6],
        "workers": 0,
    },
    "model": {"patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "train": {"max_steps": 2, "global_batch_size": 8, "micro_batch_size": 8, "validate_every_steps": 1},
    "checkpoint": {"every_steps": 1},
}
KINDS = ("flip", "truncation", "deletion")


@dataclass
class Row:
    """Damages of one kind to one file, how many of them were found, and by torch.load alone."""

    file: str
    kind: str
    damages: int = 0
    found: int = 0
    noticed_by_torch: int = 0


def run_campaign(source: Path, work: Path, flips: int, others: int, seed: int) -> list[Row]:
    """Damage a copy of the checkpoint folder `source` at `work`; each damage is undone before the next."""
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
    """File, kind, and the damaged content (None: the file is gone). A flip changes one byte to any other."""
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
    """Whether the newest checkpoint is refused by its path and by its run's, and passed over by resume=auto."""
    for load in (lambda: read_checkpoint(newest), lambda: directory.newest_whole(strict=True)):
        try:
            load()
            return False
        except ResumeRefused as refusal:
            if file.name not in str(refusal):
                return False
    with warnings_of_the_program() as messages:
        path, _ = directory.newest_whole()
    return path != newest and any(f"{newest}: {file.name}" in line for line in messages)


def is_pointer_found(directory: CheckpointDirectory, pointer: Path) -> bool:
    """Whether what follows the pointer is refused (or finds none), and a resume names it."""
    try:
        is_refused = directory.pointer(pointer.name) is None and not pointer.exists()
    except ResumeRefused as refusal:
        is_refused = str(pointer) in str(refusal)
    with warnings_of_the_program() as messages:
        _, state = directory.newest_whole()
        one_process = Context(Launch("none", "a campaign"), torch.device("cpu"))
        keep_or_forget_best(TrainProgress(**state["progress"]), directory, CheckpointConfig(), one_process)
    return is_refused and any(str(pointer) in line for line in messages)


@contextmanager
def warnings_of_the_program() -> Iterator[list[str]]:
    """Collect the messages at warning level or above while the block runs."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    log = logging.getLogger("topoflow")
    log.addHandler(handler)
    try:
        yield messages
    finally:
        log.removeHandler(handler)


def loads_in_torch(path: Path) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001 (damaged bytes make it raise anything)
        return False
    return True


def make_run(folder: Path) -> Path:
    """A run of two steps and two checkpoints; returns the folder of its checkpoints."""
    make_demo_data(folder / "data", days=6, grid=(8, 12), seed=0, progress=False)
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump({**CONFIG, "data": {**CONFIG["data"], "path": str(folder / "data")}}))
    status = train.main([str(config), f"run.dir={folder / 'run'}"])
    assert status == 0, "the run ends well"
    return folder / "run" / "checkpoints"


def print_table(rows: list[Row], sizes: dict[str, int]) -> None:
    line = "{:<15}{:>12}{:<14}{:>8}{:>8}{:>8}{:>26}"
    print(line.format("file", "bytes", "  damage", "number", "found", "missed", "refused by torch.load"))
    for row in rows:
        by_torch = row.noticed_by_torch if row.file == "state.pt" else ""
        missed = row.damages - row.found
        print(line.format(row.file, sizes[row.file], f"  {row.kind}", row.damages, row.found, missed, by_torch))


def main() -> int:
    """Run the campaign; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "run", nargs="?", type=Path, metavar="RUN", help="a run directory with at least two checkpoints"
    )
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--others", type=int, default=100, help="truncations and deletions")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        source = options.run / "checkpoints" if options.run is not None else make_run(Path(name))
        newest = CheckpointDirectory(source).folder(CheckpointDirectory(source).steps()[-1])
        sizes = {
            path.name: path.stat().st_size
            for path in (*newest.iterdir(), source / "last", source / "best")
            if path.exists()
        }
        rows = run_campaign(source, Path(name) / "damaged", options.flips, options.others, options.seed)
    print_table(rows, sizes)
    damages, found = sum(row.damages for row in rows), sum(row.found for row in rows)
    print(f"{damages} damages, {found} found, {damages - found} missed")
    return 0 if found == damages else 1


if __name__ == "__main__":
    sys.exit(main())
