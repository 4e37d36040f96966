"""Synthetic data for benchmarks.loading: the same fields prepared as float32 and float16, and as Zarr."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from tests.support.prepared import write_prepared
from topoflow.config import DataConfig
from topoflow.data.prepared.manifest import read_manifest
from topoflow.data.variables import VARIABLES

START = np.datetime64("2019-01-01T00", "h")
DYNAMIC = tuple(name for name, variable in VARIABLES.items() if variable.kind == "dynamic")
STATIC = ("elevation", "population")
TYPICAL = {"u": (0.0, 5.0), "v": (0.0, 5.0), "temp": (280.0, 10.0), "rh": (60.0, 15.0), "psfc": (95000.0, 3000.0)}
"""Mean and deviation of the variables; all others: 50 and 20."""
CONSTANTS = {name: TYPICAL.get(name, (50.0, 20.0)) for name in (*DYNAMIC, *STATIC, "lat2d", "lon2d")}


@dataclass(frozen=True)
class DataSets:
    """The same data: prepared as float32 and float16, and a Zarr store with a chunk an hour (None: not written)."""

    shape: tuple[int, int]
    single: Path
    half: Path
    zarr: Path | None

    def config(self, folder: Path, **more) -> DataConfig:
        """Return a data section over one of the folders; 15 inputs and 6 targets, the defaults."""
        return DataConfig(path=str(folder), **{"train": (2019,), "threads": 0, "normalization": CONSTANTS, **more})

    def errors_of_half(self) -> list[list[str]]:
        """Return rows about the precision of float16."""
        return [
            [v.name, v.unit, f"{v.error_max:.3g}", f"{v.error_rms:.3g}", f"{v.error_rms / (v.std or 1):.1e}"]
            for v in read_manifest(self.half).variables
        ]


def make_data_sets(folder: Path, shape: tuple[int, int], hours: int) -> DataSets:
    """Write all data sets in `folder`."""
    fields, name = make_fields(shape, hours), f"{shape[0]}x{shape[1]}"
    single = write_prepared(fields, folder / f"single-{name}")
    half = write_prepared(fields, folder / f"half-{name}", dtype="float16")
    store = folder / f"{name}.zarr"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr warns that consolidated metadata are not part of format 3 yet
        fields.to_zarr(store, encoding={name: {"chunks": (1, *shape)} for name in DYNAMIC}, consolidated=True)
    return DataSets(shape, single, half, store)


def make_fields(shape: tuple[int, int], hours: int, start: np.datetime64 = START) -> xr.Dataset:
    """Return smooth fields with a little noise, a fiftieth of them missing."""
    times = (start + np.arange(hours)).astype("datetime64[ns]")
    fields = xr.Dataset(
        coords={"time": times, "lat": np.linspace(54, 18, shape[0]), "lon": np.linspace(73, 135, shape[1])}
    )
    for seed, name in enumerate(DYNAMIC):
        mean, deviation = TYPICAL.get(name, (50.0, 20.0))
        values = (mean + deviation * _draw(shape, hours, seed + 10)).astype(np.float32)
        fields[name] = (("time", "lat", "lon"), values, {"units": VARIABLES[name].unit})
    for seed, name in enumerate(STATIC):
        fields[name] = (("lat", "lon"), _draw(shape, 1, seed)[0], {"units": VARIABLES[name].unit})
    return fields


def _draw(shape: tuple[int, int], hours: int, seed: int) -> np.ndarray:
    """Return fields float32 [hours, H, W], of order 1."""
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((1, 1, hours // 6 + 2, max(2, shape[0] // 8), max(2, shape[1] // 8)))
    smooth = torch.nn.functional.interpolate(torch.from_numpy(coarse).float(), size=(hours, *shape), mode="trilinear")
    values = smooth[0, 0].numpy() + 0.02 * rng.standard_normal((hours, *shape), np.float32)
    if hours > 1:
        values[rng.random(values.shape, np.float32) < 0.02] = np.nan
    return values
