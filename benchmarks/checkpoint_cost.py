"""Measure a checkpoint: the write and its hashes, the stall of a background save, the verified read.

    python -m benchmarks.checkpoint_cost [--parameters 50000000] [--repeats 7] [--folder DIR] [--threads 1]

The state is that of AdamW: weights and two moments, in the shapes of the paper's transformer blocks. All measurements
are repeated in turn, `--repeats` times; the table has median and range. Reads come from the page cache, which makes the
share of the hashes as large as possible. Exit status 1 if a stall exceeds 10 % of a synchronous save; below
JUDGED_PARAMETERS this is only reported, because fixed costs dominate.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from topoflow.checkpoint.directory import CheckpointDirectory
from topoflow.checkpoint.file import FORMAT, STATE, named_tensors, read_checkpoint, verify_checkpoint, write_checkpoint
from topoflow.checkpoint.saver import CheckpointSaver
from topoflow.checkpoint.state import capture_state
from topoflow.config import CheckpointConfig
from topoflow.launch import Launch
from topoflow.ranks import Context

EMBED_DIM = 768

PLAIN_SAVE, OUR_SAVE, HASHES = "torch.save, flushed", "synchronous save", "hashes of a save alone"
FIRST_STALL, LATER_STALL = "stall of the first background save", "stall of later background saves"
BACKGROUND_SAVE = "background save while training continues"
STEP, STEP_WHILE_WRITING = "a step of a small loop", "a step while a checkpoint is written"
PLAIN_LOAD, VERIFICATION, OUR_LOAD = "torch.load", "verification", "verified load"


class Timings:
    """Seconds of each measured action, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def measure(self, name: str, action: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = action()
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def print_line(self, name: str, of: str | None = None) -> None:
        values = self.seconds[name]
        share = f"{100 * self.median(name) / self.median(of):8.1f} % of {of}" if of is not None else ""
        print(f"{name:<44}{self.median(name):9.4f} s  ({min(values):.4f} to {max(values):.4f}){share}")


class Blocks(nn.Module):
    """Enough of the paper's transformer blocks to reach the number of parameters."""

    def __init__(self, parameters: int):
        super().__init__()
        sizes = (
            (3 * EMBED_DIM, EMBED_DIM),
            (EMBED_DIM, EMBED_DIM),
            (4 * EMBED_DIM, EMBED_DIM),
            (EMBED_DIM, 4 * EMBED_DIM),
        )
        self.weights = nn.ParameterList()
        while sum(weight.numel() for weight in self.weights) < parameters:
            self.weights.append(nn.Parameter(torch.randn(sizes[len(self.weights) % len(sizes)])))


def build_state(parameters: int) -> dict[str, Any]:
    """Return the live content of a checkpoint of such a model."""
    model = Blocks(parameters)
    names, weights = zip(*model.named_parameters(), strict=True)
    optimizer = torch.optim.AdamW(
        [{"name": "all", "param_names": list(names), "params": list(weights), "initial_lr": 1e-3}], lr=1e-3
    )
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return {"format": FORMAT, **capture_state(model, optimizer, scheduler), "progress": {"step": 1}, "certificate": {}}


def save_plainly(state: dict[str, Any], path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def hash_all(state: dict[str, Any], path: Path) -> None:
    """Hash what a save hashes: the file, then each tensor."""
    with open(path, "rb") as file:
        hashlib.file_digest(file, "sha256")
    for _, tensor in named_tensors(state):
        hashlib.sha256(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def build_loop() -> Callable[[], None]:
    """Return a training step of some milliseconds, mostly small operations that Python starts."""
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(24)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.randn(64, 256)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_write_and_read(state: dict[str, Any], folder: Path, timings: Timings) -> None:
    state["progress"]["step"] = 1
    timings.measure(PLAIN_SAVE, lambda: save_plainly(state, folder / "plain.pt"))
    timings.measure(OUR_SAVE, lambda: write_checkpoint(folder / "step-00000001", state))
    timings.measure(HASHES, lambda: hash_all(state, folder / "step-00000001" / STATE))
    timings.measure(PLAIN_LOAD, lambda: torch.load(folder / "plain.pt", map_location="cpu", weights_only=True))
    timings.measure(VERIFICATION, lambda: verify_checkpoint(folder / "step-00000001"))
    timings.measure(OUR_LOAD, lambda: read_checkpoint(folder / "step-00000001"))


def measure_stall(state: dict[str, Any], folder: Path, timings: Timings, saves: int) -> None:
    """Measure how long the loop waits for a save of a new run, and its steps while the thread writes."""
    context = Context(Launch("none", "a benchmark"), torch.device("cpu"))
    committed: list[int] = []
    saver = CheckpointSaver(
        context,
        CheckpointDirectory(folder),
        CheckpointConfig(keep_last=1),
        lambda: state,
        lambda step, _: committed.append(step),
    )
    saver.prepare(3 * sum(tensor.nbytes for tensor in state["model"].values()))
    step = build_loop()
    for _ in range(50):  # a run saves after many more
        step()
    for number in range(1, saves + 1):
        for _ in range(50):
            timings.measure(STEP, step)
        state["progress"]["step"] = number
        stall = FIRST_STALL if number == 1 else LATER_STALL
        timings.measure(stall, lambda number=number: saver.save(number, is_best=False))
        start = time.perf_counter()
        while number not in committed:
            timings.measure(STEP_WHILE_WRITING, step)
            assert not saver.poll(), "the save failed"
        timings.seconds.setdefault(BACKGROUND_SAVE, []).append(time.perf_counter() - start)
    saver.close()


def name_file_system(folder: Path) -> str:
    """Return the file system of a folder, such as `ext4 on /dev/sda1`, from /proc/mounts."""
    mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [(point, kind, device) for device, point, kind in mounts if folder.resolve().is_relative_to(point)]
    _, kind, device = max(inside, key=lambda mount: len(mount[0]))
    return f"{kind} on {device}"


JUDGED_PARAMETERS = 10_000_000


def main() -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=50_000_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    state, timings = build_state(options.parameters), Timings()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        megabytes = sum(tensor.nbytes for _, tensor in named_tensors(state)) / 1e6
        tensors = sum(1 for _ in named_tensors(state))
        print(f"{megabytes:.0f} MB in {tensors} tensors, {name_file_system(folder)}, {os.cpu_count()} CPUs, ", end="")
        print(f"{options.threads} thread(s), torch {torch.__version__}")
        for number in range(options.repeats):
            measure_write_and_read(state, folder, timings)
            (folder / f"run{number}").mkdir()
            measure_stall(state, folder / f"run{number}", timings, saves=3)
            shutil.rmtree(folder / f"run{number}")
    is_broken = print_results(timings)
    return int(is_broken and options.parameters >= JUDGED_PARAMETERS)


def print_results(timings: Timings) -> bool:
    """Print the table and each broken limit; return whether there is one."""
    for name, of in (
        (PLAIN_SAVE, None),
        (OUR_SAVE, PLAIN_SAVE),
        (HASHES, PLAIN_SAVE),
        (FIRST_STALL, OUR_SAVE),
        (LATER_STALL, OUR_SAVE),
        (BACKGROUND_SAVE, OUR_SAVE),
        (STEP, None),
        (STEP_WHILE_WRITING, STEP),
        (PLAIN_LOAD, None),
        (VERIFICATION, PLAIN_LOAD),
        (OUR_LOAD, PLAIN_LOAD),
    ):
        timings.print_line(name, of)
    broken = [
        f"{name} costs more than 10 % of {OUR_SAVE}"
        for name in (FIRST_STALL, LATER_STALL)
        if timings.median(name) > 0.1 * timings.median(OUR_SAVE)
    ]
    print("\n".join(broken) or "all limits hold")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
