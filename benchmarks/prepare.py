"""Measure `topoflow prepare`: bytes written per second beside a copy of the file, and peak memory at two sizes.

    python -m benchmarks.prepare [--hours 744] [--memory-hours 372 1488] [--rounds 3] [--shape 128x256] [--folder DIR]

Reads an uncompressed NetCDF file (11 variables, float32) and writes it on its own grid; 744 hours of 128 x 256 cells
are 1 GB. Each round runs the whole command and, in turn, `cp` of the same file, both until the bytes are on the disk.
Figures are medians with their range, in MB of float32 written. Seconds of processor time hardly depend on what else the
machine does. Memory is the largest resident size of the command's process. Exit status 1 if memory exceeds 2 GB or
grows with the input.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import netCDF4
import numpy as np

from benchmarks.fresh import alternate
from benchmarks.machine import main as describe_machine
from benchmarks.tables import print_table, ratio, spread
from topoflow.data.variables import VARIABLES

TYPICAL = {"u": (0.0, 4.0), "v": (0.0, 4.0), "temp": (285.0, 8.0), "rh": (50.0, 8.0), "psfc": (95000.0, 1500.0)}
"""Mean and deviation; of concentrations 60 and 10."""
DYNAMIC = tuple(name for name, variable in VARIABLES.items() if variable.kind == "dynamic")
MOST_BYTES = 2e9
GROWTH = 1.1
"""Peak memory of the larger input over that of the smaller; more counts as growth."""


@dataclass(frozen=True)
class Cost:
    """What a command took: wall time, processor time, and the peak of its resident memory."""

    seconds: float
    processor_seconds: float
    peak_bytes: int


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; return 1 if memory exceeds its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=int, default=744)
    parser.add_argument("--memory-hours", type=int, nargs=2, default=(372, 1488))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", type=lambda text: tuple(map(int, text.split("x"))), default=(128, 256))
    parser.add_argument(
        "--folder", type=Path, default=None, help="where files are written (default: a temporary folder)"
    )
    options = parser.parse_args(arguments)
    describe_machine()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        measure_speed(folder, options.hours, options.shape, options.rounds)
        return measure_memory(folder, tuple(options.memory_hours), options.shape)


def measure_speed(folder: Path, hours: int, shape: tuple[int, int], rounds: int) -> None:
    """Print the speed of prepare and of a copy."""
    path = write_file(folder / "fields.nc", hours, shape)
    written = len(DYNAMIC) * hours * shape[0] * shape[1] * 4
    commands = {"prepare": lambda: run_prepare(path, folder / "out"), "cp": lambda: run_copy(path, folder / "copy.nc")}
    measured, _ = alternate(list(commands), rounds, lambda name: commands[name]())
    seconds = {name: [cost.seconds for cost in costs] for name, costs in measured.items()}
    print(
        f"{written / 1e9:.2f} GB of float32: {hours} hours, {len(DYNAMIC)} variables, {shape[0]} x {shape[1]} cells\n"
    )
    rows = [
        [
            name,
            spread(seconds[name]),
            spread([written / 1e6 / value for value in seconds[name]]),
            spread([cost.processor_seconds for cost in costs]),
        ]
        for name, costs in measured.items()
    ]
    print_table(["command", "s", "MB/s", "processor s"], rows)
    print(f"prepare / cp: {ratio(seconds['prepare'], seconds['cp'])} times the time\n", flush=True)
    path.unlink()


def measure_memory(folder: Path, hours: tuple[int, ...], shape: tuple[int, int]) -> int:
    """Print the peak memory for inputs of two lengths; return 1 if it is too much or grows."""
    peaks, rows = [], []
    for count in hours:
        path = write_file(folder / "fields.nc", count, shape)
        peaks.append(run_prepare(path, folder / "out").peak_bytes)
        rows.append([f"{path.stat().st_size / 1e9:.2f} GB", f"{peaks[-1] / 1e9:.2f}"])
        path.unlink()
    print_table(["input", "peak memory in GB"], rows)
    is_small = max(peaks) < MOST_BYTES and peaks[-1] < GROWTH * peaks[0]
    if not is_small:
        print(f"expected less than {MOST_BYTES / 1e9:.0f} GB, and no growth with the input")
    return 0 if is_small else 1


def write_file(path: Path, hours: int, shape: tuple[int, int]) -> Path:
    """Write noise about typical values, uncompressed and contiguous, rows north first."""
    draw = np.random.default_rng(0)
    with netCDF4.Dataset(path, "w") as file:
        for name, size, values, unit in (
            ("time", hours, np.arange(hours), "hours since 2019-01-01"),
            ("lat", shape[0], np.linspace(48, 16, shape[0]), "degrees_north"),
            ("lon", shape[1], np.linspace(74, 138, shape[1]), "degrees_east"),
        ):
            file.createDimension(name, size)
            file.createVariable(name, "f8", (name,))[:] = values
            file[name].units = unit
        for name in DYNAMIC:
            variable = file.createVariable(name, "f4", ("time", "lat", "lon"), contiguous=True)
            variable.units = VARIABLES[name].unit
            mean, deviation = TYPICAL.get(name, (60.0, 10.0))
            for first in range(0, hours, 24):
                count = min(24, hours - first)
                noise = draw.standard_normal((count, *shape), np.float32)
                variable[first : first + count] = mean + deviation * noise
    with open(path) as written:
        os.fsync(written.fileno())
    return path


def run_prepare(path: Path, output: Path) -> Cost:
    """Run the command, and delete what it wrote."""
    cost = run([sys.executable, "-m", "topoflow", "prepare", str(path), "-o", str(output)])
    shutil.rmtree(output)
    return cost


def run_copy(path: Path, output: Path) -> Cost:
    """Copy the file and flush the copy."""
    cost = run(["sh", "-c", 'cp "$1" "$2" && sync "$2"', "sh", str(path), str(output)])
    output.unlink()
    return cost


def run(command: list[str]) -> Cost:
    """Run a command.

    Raises:
        CalledProcessError: it failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


if __name__ == "__main__":
    sys.exit(main())
