"""What the first process of a node finds in its caches, the data set and the run directory."""

import secrets
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from topoflow.data.assembly import open_forecast_data
from topoflow.data.channels import input_channels
from topoflow.data.normalization import Normalization
from topoflow.environment import CACHES, select_variables
from topoflow.files import flush
from topoflow.tools.doctor.probe import SMALL, Process
from topoflow.tools.doctor.report import FAIL, OK, WARNING, Found, Report, format_value

READ_SECONDS, MOST_SAMPLES, WRITE_BYTES = 2.0, 64, 16 * 2**20
VISIBLE_SECONDS = 3.0
"""How long a node may take to see a file that another has written (network file systems cache folders)."""
CHECKPOINT_COPIES = 3
"""A checkpoint holds the weights and two moments."""
MIOPEN_DEFAULTS = {"MIOPEN_USER_DB_PATH": ".config/miopen", "MIOPEN_CUSTOM_CACHE_DIR": ".cache/miopen"}
"""Where MIOpen writes without its variables, below the home folder."""


def nearest_folder(path: Path) -> Path:
    """Return `path`, or the nearest path above it that exists (a file in place of a folder fails where it is used)."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def leave_mark(process: Process, folder: Path) -> None:
    """Write a small file that other nodes may see, to be removed at the end."""
    mark = folder / process.mark
    process.left.callback(mark.unlink, missing_ok=True)
    mark.write_bytes(b"x")


def mark_caches(process: Process, found: Found) -> None:
    """Check that the cache folders (or the nearest ones above them) can be written, leaving a mark in each."""
    paths = {"HOME": Path.home(), "TMPDIR": Path(tempfile.gettempdir())}
    if torch.version.hip:
        paths |= {name: Path.home() / default for name, default in MIOPEN_DEFAULTS.items()}
    paths |= {name: Path(value) for name, value in select_variables(CACHES).items()}
    folders = {name: str(nearest_folder(path)) for name, path in paths.items()}
    needed = ("TMPDIR", *(("TORCHINDUCTOR", "TRITON") if process.config.train.compile else ()))
    for name, folder in folders.items():
        try:
            leave_mark(process, Path(folder))
        except OSError as error:
            text = f"{name}, {folder}: cannot be written ({error.strerror}): set {name} to a writable folder"
            found.find(FAIL if name.startswith(needed) else WARNING, text)
    found.figures["caches"] = folders
    found.summary = ", ".join(f"{name} {folder}" for name, folder in folders.items())


def check_caches(process: Process, found: Found) -> None:
    """Check, too, that no other node writes to a cache of MIOpen, which it would corrupt."""
    marks = [process.others[rank]["mark"] for rank in process.leaders if rank not in process.ranks_of[process.host]]
    for name, folder in found.figures["caches"].items():
        if name in MIOPEN_DEFAULTS and any(Path(folder, mark).exists() for mark in marks):
            why = "other nodes write there too, which corrupts a cache of MIOpen"
            found.find(WARNING, f"{name}, {folder}: {why}: set it to a folder in the node's /tmp")


def check_data(process: Process, found: Found) -> None:
    """Open the data set as training does, and read random training samples."""
    config, model, start = process.config.data, process.config.model, time.monotonic()
    if process.config is SMALL:
        found.summary = "no CONFIG: not examined"
        return
    form = (model.wind != "none", model.terrain != "none", model.leads == "joint")
    data = open_forecast_data(config, *form, only=("train",))
    names = (*(channel.variable for channel in input_channels(config)), *data.target_names)
    dataset = data.dataset("train", Normalization.from_dict(dict.fromkeys(names, (0.0, 1.0))))
    opened = time.monotonic()
    # different samples on each node and in each call, so that caches help little
    draws, count, read_bytes = np.random.default_rng(), 0, 0
    while count < MOST_SAMPLES and (count == 0 or time.monotonic() - opened < READ_SECONDS):
        sample = dataset[int(draws.integers(len(dataset)))]
        read_bytes += sum(sample[name].nbytes for name in ("x", "y", "wind_ms") if name in sample)
        count += 1
    seconds, shape = time.monotonic() - opened, data.grid.shape
    if model.img_size is not None and tuple(model.img_size) != shape:
        found.find(FAIL, f"model.img_size: {list(model.img_size)}: expected the data's {list(shape)}")
    found.same[f"{config.path} has other contents: its fingerprint"] = data.contents.fingerprint
    found.facts["shape"] = shape
    found.figures |= {
        "data_samples_per_second": count / seconds,
        "data_bytes_per_second": read_bytes / seconds,
        "data_open_seconds": opened - start,
    }
    size = f"{shape[0]} x {shape[1]} cells"
    found.summary = f"{config.path}: {size}; random samples, one process per node; caches may flatter"


def mark_run_directory(process: Process, found: Found) -> None:
    """Leave a mark in the run directory, or in the nearest folder above it."""
    folder = nearest_folder(process.run_dir)
    leave_mark(process, folder)
    found.facts["folder"] = str(folder)


def remove_marks_at_end(process: Process) -> None:
    """Let rank 0 remove what killed processes leave in the run directory."""
    if folder := process.found["run directory"].facts.get("folder"):
        for rank in process.leaders:
            process.left.callback(Path(folder, process.others[rank]["mark"]).unlink, missing_ok=True)


def check_run_directory(process: Process, found: Found) -> None:
    """Look for the mark of rank 0, and on rank 0 for those of the others; measure free space and speed."""
    folder, leaders = Path(found.facts["folder"]), process.leaders
    wanted = {rank: folder / process.others[rank]["mark"] for rank in (leaders if process.launch.is_main else [0])}
    deadline, seen = time.monotonic() + VISIBLE_SECONDS, []
    while len(seen) < len(wanted) and time.monotonic() < deadline:
        time.sleep(0.05)
        seen = [rank for rank, mark in wanted.items() if mark.is_file()]
    free = shutil.disk_usage(folder).free
    found.facts["seen"] = seen
    found.figures |= {"free_bytes": free, "sees_run_directory": 0 in seen}
    if 0 in seen:
        data = secrets.token_bytes(min(WRITE_BYTES, free // (2 * len(leaders))))  # not compressible
        start = time.monotonic()
        with (folder / process.mark).open("wb") as file:
            file.write(data)
            flush(file)
        found.figures["write_bytes_per_second"] = len(data) / (time.monotonic() - start)


def compare_run_directories(report: Report, found: Mapping[str, Found]) -> str:
    """Check that all nodes see one run directory, and that there is room."""
    run_dir, main = report.head["run_directory"], found.get(report.node_of[0])
    if main is None:
        return f"{run_dir}: rank 0 cannot create a file there"
    here, size = main.facts["folder"], CHECKPOINT_COPIES * report.found[0]["model"].facts.get("gradient_bytes", 0)
    kept = report.config.checkpoint.keep_last + report.config.checkpoint.keep_best + 1
    for node, item in found.items():
        if 0 not in item.facts["seen"] and item.facts["folder"] == here:
            text = f"{here} is not that of rank 0, whose file is not in it: expected one file system for all nodes"
            item.find(FAIL, text)
        elif 0 not in item.facts["seen"]:
            text = f"there is no {here} (nearest: {item.facts['folder']}): mount the same file system on all nodes"
            item.find(FAIL, text)
        elif report.nodes[node]["ranks"][0] not in main.facts["seen"]:
            text = f"what is written to {here} never appears on rank 0's node: expected one file system"
            item.find(FAIL, text)
        free = item.figures["free_bytes"]
        each = f"a checkpoint takes {format_value(size, 'B')}, and up to {kept} exist at a time"
        verdict = FAIL if free < size else WARNING if free < size * kept else OK
        item.find(verdict, f"{format_value(free, 'B')} free: {each}: make room")
    place = here if here == run_dir else f"{run_dir} does not exist: examined {here}"
    return f"{place}; a checkpoint takes {format_value(size, 'B')}; written with fsync, all nodes at once"
