"""The data set on each node: whether it is there, whether it is the same, and how fast its samples come."""

import dataclasses
import functools
import statistics
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np

from topoflow.config import Config
from topoflow.data.assembly import open_forecast_data
from topoflow.data.grid import Grid, build_grid
from topoflow.data.normalization import Normalization
from topoflow.tools.doctor.amounts import show_rate
from topoflow.tools.doctor.report import FAIL, WARNING, Check
from topoflow.tools.doctor.survey import Survey, values

OPEN_AND_READ_SECONDS = 20.0
READ_SECONDS, MOST_SAMPLES = 2.0, 64
SLOW_SHARE = 0.25
"""A node that reads at less than this share of the median stands out."""


@dataclass(frozen=True)
class DataLook:
    """What one node found. rows, columns: of the grid."""

    rows: int
    columns: int
    fingerprint: str
    open_seconds: float
    samples_per_second: float
    bytes_per_second: float


def check_data(survey: Survey, config: Config, is_configured: bool) -> tuple[Check, tuple[int, int]]:
    """The data set is readable and the same on all nodes. Returns the grid's shape too, also where nothing is read."""
    check = Check("data")
    patch = config.model.patch_size
    shape = config.model.img_size or (12 * patch, 16 * patch)
    if not is_configured:
        check.summary = f"no CONFIG was given: not examined; a grid of {shape[0]} x {shape[1]} cells for what follows"
        return check, shape
    # other samples on each node and in each call, so that what lies in caches helps little
    answers = survey.ask_nodes(functools.partial(read_samples, config), OPEN_AND_READ_SECONDS)
    looks: dict[int, DataLook] = values(answers)
    check.findings += survey.failures(answers, whole_node=True)
    if not looks:
        check.summary = f"{config.data.path}: not readable anywhere"
        return check, shape
    usual, _ = Counter(look.fingerprint for look in looks.values()).most_common(1)[0]
    rate = statistics.median(look.samples_per_second for look in looks.values())
    for rank, look in looks.items():
        check.note(
            survey.node_of[rank],
            data_samples_per_second=look.samples_per_second,
            data_bytes_per_second=look.bytes_per_second,
            data_open_seconds=look.open_seconds,
        )
        if look.fingerprint != usual:
            text = f"{config.data.path} has other contents than on most nodes: expected the same data set on all"
            check.findings.append(survey.finding(FAIL, rank, text, whole_node=True))
        if look.samples_per_second < SLOW_SHARE * rate:
            text = (
                f"reads {look.samples_per_second:.3g} samples/s, the median node {rate:.3g}: look at its mount and "
                "its network"
            )
            check.findings.append(survey.finding(WARNING, rank, text, whole_node=True))
    first = looks[min(looks)]
    if config.model.img_size is not None and shape != (first.rows, first.columns):
        text = f"model.img_size: {list(shape)}: expected the data's {[first.rows, first.columns]}"
        check.findings += survey.about_all(FAIL, text)
    slowest = min(looks.values(), key=lambda look: look.samples_per_second)
    check.summary = (
        f"{config.data.path}: {first.rows} x {first.columns} cells; random samples, one process a node: "
        f"{slowest.samples_per_second:.3g} samples/s ({show_rate(slowest.bytes_per_second)}) or more; caches may "
        "flatter"
    )
    return check, (first.rows, first.columns)


def read_samples(config: Config) -> DataLook:
    """Open the data set as training does, but for holding it in memory, and read random samples of its training split.

    Raises:
        ConfigError, DataError, MissingPath: it is not what the config says.
    """
    start = time.monotonic()
    on_disk = dataclasses.replace(config.data, in_memory=False)
    model = config.model
    data = open_forecast_data(on_disk, model.wind != "none", model.terrain != "none", only=("train",))
    names = (*data.input_names, *data.target_names)
    dataset = data.dataset("train", Normalization.from_dict(dict.fromkeys(names, (0.0, 1.0))))
    opened = time.monotonic()
    draws, read = np.random.default_rng(), 0
    while read < MOST_SAMPLES and (read == 0 or time.monotonic() - opened < READ_SECONDS):
        dataset[int(draws.integers(len(dataset)))]
        read += 1
    seconds = time.monotonic() - opened
    data.source.close()
    rows, columns = data.grid.shape
    # fields that change in time, once for the inputs and once for the targets, as float32
    fields = len(set(data.input_names) & set(data.source.dynamic)) + len(data.target_names) + 2 * data.with_wind
    rate = read / seconds
    bytes_per_second = rate * 4 * fields * rows * columns
    return DataLook(rows, columns, data.source.fingerprint, opened - start, rate, bytes_per_second)


def plain_grid(shape: tuple[int, int]) -> Grid:
    """A regular grid of the shape, about the equator: the model's cost does not depend on where cells are."""
    rows, columns = shape
    lat, lon = (np.arange(count) * min(0.25, 120 / count) for count in shape)
    lat2d, lon2d = np.meshgrid(lat - lat.mean(), lon, indexing="ij")
    assert lat2d.shape == (rows, columns)
    return build_grid(lat2d, lon2d, "the doctor's grid")
