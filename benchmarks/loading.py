"""Loading speed of samples, and that of the published program's loader from Zarr, compared in one run.

    python -m benchmarks.loading [--sizes 32x64,128x256] [--hours 1500,400] [--rounds 7] [--quick]

Prints Markdown tables. Data are created in a temporary folder (about 2 GB with the defaults). The loaders take turns in
each round; a figure is the median over rounds with its range, a ratio that of medians with the quartiles over rounds.
"""

import argparse
import dataclasses
import functools
import itertools
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.loading_data import CONSTANTS, DataSets, make_data_sets, make_fields
from benchmarks.published_loader import PublishedSamples
from benchmarks.tables import print_table, ratio, spread
from tests.support.prepared import write_prepared
from topoflow.config import ModelConfig
from topoflow.data.assembly import open_forecast_data
from topoflow.data.dataset import ForecastDataset
from topoflow.data.sampling import BatchPlan, build_train_loader
from topoflow.loss import loss_sums
from topoflow.model.topoflow import build_model
from topoflow.physics.climatology import ANNUAL_TERMS, HOURS
from topoflow.physics.persistence import DampedPersistence

BATCH = 4
CONSUMER_SECONDS = 0.01
"""Time that a consumer takes for a sample, whose waiting is measured at the largest size."""
SIX_YEARS, CELLS_OF_YEARS = 52_584, (8, 8)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="32x64,128x256", help="grids (default: %(default)s)")
    parser.add_argument("--hours", default="1500,400", help="hours of data for each grid (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--quick", action="store_true", help="a smoke run on tiny data; the figures mean nothing")
    options = parser.parse_args(arguments)
    sizes = [tuple(map(int, size.split("x"))) for size in options.sizes.split(",")]
    hours, years, rounds = list(map(int, options.hours.split(","))), (1, 6), options.rounds
    if options.quick:
        sizes, hours, years, rounds = [(8, 16)], [200], (1,), 2
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        made = [make_data_sets(folder, shape, length) for shape, length in zip(sizes, hours, strict=True)]
        for data in made:
            print_samples(data, rounds, options.quick)
            print_precision(data)
        print_waiting(made, rounds, 5 if options.quick else 25)
        print_opening(folder, years, rounds)
    return 0


def in_turn(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return the results of each in each round, after a warm-up round."""
    results: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, measure in contestants.items():
            value = measure()
            if number:
                results[name].append(value)
    return results


# ---- samples


def open_samples(data: DataSets, folder: Path, **more) -> ForecastDataset:
    """Return our data set over one of the folders, with wind."""
    config = data.config(folder, **more)
    opened = open_forecast_data(config, True, True)
    return opened.dataset("train", opened.build_normalization())


def open_with_base(data: DataSets) -> ForecastDataset:
    """Return our data set with targets as differences from a seasonal base, and inputs as anomalies."""
    config = data.config(data.single, anomalies=True)
    opened, leads = open_forecast_data(config, True, True), config.lead_times_hours
    sizes = {"hourly": HOURS, "annual": ANNUAL_TERMS, "filled": HOURS, "slope": len(leads)}
    arrays = {name: np.zeros((len(config.targets), size, *data.shape), np.float32) for name, size in sizes.items()}
    arrays |= {"squares": np.ones((len(config.targets), 2), np.float32), "lead_times_hours": np.array(leads)}
    normalization = dataclasses.replace(opened.build_normalization(), base=DampedPersistence.from_arrays(arrays))
    return opened.dataset("train", normalization)


def our_batches(dataset: ForecastDataset, in_order: bool, threads: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of BATCH samples from our loader without end."""
    if in_order:
        return (dataset.batch(list(batch)) for batch in _in_order(len(dataset)))
    plan = BatchPlan(len(dataset), 0, BATCH, BATCH, 0, 1)
    return iter(build_train_loader(dataset, plan, epoch=0, threads=threads))


def published_batches(data: DataSets, in_order: bool) -> Iterator[list[torch.Tensor]]:
    """Yield batches from the published program's loader without end."""
    config = data.config(data.single)
    assert data.zarr is not None
    samples = PublishedSamples(
        data.zarr, config.variables, config.targets, CONSTANTS, config.lead_times_hours, data.shape
    )
    plan = BatchPlan(len(samples), 0, BATCH, BATCH, 0, 1)
    order = _in_order(len(samples)) if in_order else (b for e in itertools.count() for b in plan.micro_batches(e))
    return iter(DataLoader(samples, batch_sampler=order))


def _in_order(count: int) -> Iterator[range]:
    while True:
        yield from (range(first, first + BATCH) for first in range(0, count - BATCH + 1, BATCH))


def rate(batches: Iterator, count: int) -> Callable[[], float]:
    """Return a function that takes so many batches and returns samples per second."""

    def measure() -> float:
        start = time.perf_counter()
        for _ in itertools.islice(batches, count):
            pass
        return BATCH * count / (time.perf_counter() - start)

    return measure


def print_samples(data: DataSets, rounds: int, quick: bool) -> None:
    """Print samples per second of all loaders."""
    counts = (5, 40) if quick else (10, 400)
    for in_order in (False, True):
        contestants = {"published, Zarr, a chunk an hour": rate(published_batches(data, in_order), counts[0])}
        for name, folder in (("float32", data.single), ("float16", data.half)):
            contestants[f"ours, prepared, {name}"] = rate(our_batches(open_samples(data, folder), in_order), counts[1])
        contestants["ours, prepared, float32, seasonal base"] = rate(
            our_batches(open_with_base(data), in_order), counts[1]
        )
        found = in_turn(contestants, rounds)
        published = next(iter(found.values()))
        rows = [[name, spread(values), ratio(values, published, 1)] for name, values in found.items()]
        order = "in order" if in_order else "in random order"
        print(f"Samples per second, {order}, {data.shape[0]} x {data.shape[1]}, batches of {BATCH}, one process\n")
        print_table(["loader", "samples/s (range)", "this / published (quartiles)"], rows)


def print_precision(data: DataSets) -> None:
    """Print the loss of precision with float16."""
    print(f"Loss of precision with float16, {data.shape[0]} x {data.shape[1]}\n")
    print_table(["variable", "unit", "largest error", "RMS error", "RMS over deviation"], data.errors_of_half())


# ---- waiting


def print_waiting(made: list[DataSets], rounds: int, steps: int) -> None:
    """Print the share of time that loops wait for batches of BATCH.

    At the first size the loop trains a network of width 96, depth 3, 4 heads; at the last it sleeps in place of that.
    """
    small, large = made[0], made[-1]
    contestants = {}
    for threads in (0, 1, 2):
        train = training(small)
        contestants[f"{small.shape[0]} x {small.shape[1]}, a network, {threads} thread(s)"] = waiting(
            small, threads, steps, train
        )
    for threads in (0, 1, 2):
        contestants[f"{large.shape[0]} x {large.shape[1]}, 10 ms a sample, {threads} thread(s)"] = waiting(
            large, threads, steps, lambda batch: time.sleep(CONSUMER_SECONDS * BATCH)
        )
    found = in_turn(contestants, max(2, rounds // 2))
    print("Share of its time that a loop waits for data\n")
    print_table(["loop", "% (range)"], [[name, spread(values, 100)] for name, values in found.items()])


def training(data: DataSets) -> Callable[[dict[str, torch.Tensor]], None]:
    """Return a function that takes a training step on a batch."""
    dataset = open_samples(data, data.single)
    config = ModelConfig(patch_size=2, embed_dim=96, depth=3, num_heads=4, drop_rate=0.0, drop_path=0.0, wind="rank")
    grid = dataset.data.grid
    model = build_model(
        config, dataset.input_names, dataset.target_names, grid.shape, *grid.patch_centres_km(2), seed=0
    )
    optimizer, elevation_m = torch.optim.AdamW(model.parameters()), torch.from_numpy(dataset.data.heights_m())

    def step(batch: dict[str, torch.Tensor]) -> None:
        sums, counts = loss_sums(model, batch, elevation_m, "fp32")
        (sums.sum() / counts.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def waiting(
    data: DataSets, threads: int, steps: int, consume: Callable[[dict[str, torch.Tensor]], None]
) -> Callable[[], float]:
    """Return a function that consumes some batches and returns the share of time spent waiting for them."""
    dataset = open_samples(data, data.single)

    def measure() -> float:
        batches, waited = our_batches(dataset, in_order=False, threads=threads), 0.0
        next(batches)  # threads start
        start = time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            consume(batch)
        return waited / (time.perf_counter() - start)

    return measure


# ---- opening


def print_opening(folder: Path, years: tuple[int, ...], rounds: int) -> None:
    """Print the time to open data, and the memory that an open data set holds, by length."""
    rows = []
    for count in years:
        start = np.datetime64(f"{2019 - count + 1}-01-01T00", "h")
        hours = int((np.datetime64("2020-01-01T00", "h") - start).astype(int))
        path = write_prepared(make_fields(CELLS_OF_YEARS, hours, start), folder / f"years-{count}")
        data = DataSets(CELLS_OF_YEARS, path, path, None)
        [values] = in_turn({"prepared": opening(data, path)}, rounds).values()
        held = memory_of(functools.partial(open_samples, data, path))
        rows.append([f"{count} year(s)", str(hours), spread(values, 1e3), f"{held / 1e6:.2f}"])
    print(f"Opening, {CELLS_OF_YEARS[0]} x {CELLS_OF_YEARS[1]}, from the path to the first sample\n")
    print_table(["data", "hours", "ms (range)", "MB held"], rows)


def opening(data: DataSets, folder: Path) -> Callable[[], float]:
    """Return a function that opens the data, reads a sample, and returns the seconds it took."""

    def measure() -> float:
        start = time.perf_counter()
        dataset = open_samples(data, folder)
        dataset[len(dataset) // 2]
        return time.perf_counter() - start

    return measure


def memory_of(make: Callable[[], object]) -> int:
    """Return the bytes that Python and numpy allocate for the result of `make`."""
    tracemalloc.start()
    made = make()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del made
    return held


if __name__ == "__main__":
    sys.exit(main())
