"""Synthetic data sets for benchmarks.loading: the same fields as stores of two layouts, and packed."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from topoflow.tools.prepare.packing import PackOptions, pack
from topoflow.tools.prepare.store_writer import Field, StoreWriter

from topoflow.config import DataConfig
from topoflow.data.prepared.manifest import Manifest
from topoflow.data.variables import VARIABLES

START = np.datetime64("2019-01-01T00", "h")
DYNAMIC = tuple(name for name, variable in VARIABLES.items() if variable.kind == "dynamic")
STATIC = ("elevation", "population")
TYPICAL = {"u": (0.0, 5.0), "v": (0.0, 5.0), "temp": (280.0, 10.0), "rh": (60.0, 15.0), "psfc": (95000.0, 3000.0)}
"""Mean and deviation of the variables; all others: 50 and 20."""
CONSTANTS = {name: TYPICAL.get(name, (50.0, 20.0)) for name in (*DYNAMIC, *STATIC, "lat2d", "lon2d")}


@dataclass(frozen=True)
class DataSets:
    """Folders with the same data: Zarr as our writer writes it; Zarr with a chunk an hour, as xarray writes it; packed
    as float32 and float16."""

    shape: tuple[int, int]
    written: Path
    hourly: Path
    packed: Path
    half: Path
    manifest_of_half: Manifest

    def config(self, folder: Path, **more) -> DataConfig:
        """Return a data section over one of the folders; 15 inputs and 6 targets, the defaults."""
        options = {"in_memory": False, "threads": 0, "normalization": CONSTANTS, **more}
        return DataConfig(path=str(folder), train=(2019,), **options)


def make_data_sets(folder: Path, shape: tuple[int, int], hours: int) -> DataSets:
    """Write all data sets in `folder`."""
    name = f"{shape[0]}x{shape[1]}"
    written, hourly, packed, half = (folder / f"{kind}-{name}" for kind in ("written", "hourly", "packed", "half"))
    write_fields(written, shape, hours)
    _write_hourly(next(written.glob("*.zarr")), hourly)
    pack(str(written), packed, PackOptions(), progress=False)
    report = pack(str(written), half, PackOptions(dtype="float16"), progress=False)
    return DataSets(shape, written, hourly, packed, half, report.manifest)


def write_fields(output: Path, shape: tuple[int, int], hours: int, start: np.datetime64 = START) -> None:
    """Write smooth fields with a little noise, a fiftieth of them missing, with our writer."""
    static = {name: (Field(VARIABLES[name].unit, name), _fields(shape, 1, seed)[0]) for seed, name in enumerate(STATIC)}
    dynamic = {name: Field(VARIABLES[name].unit, name) for name in DYNAMIC}
    lat, lon = np.linspace(54, 18, shape[0]), np.linspace(73, 135, shape[1])
    writer = StoreWriter(output, start + np.arange(hours), lat, lon, static, dynamic, {})
    at_once = max(24, 2**24 // (shape[0] * shape[1]))
    with writer:
        for number, block in enumerate(writer.blocks(at_once)):
            for seed, name in enumerate(DYNAMIC):
                mean, deviation = TYPICAL.get(name, (50.0, 20.0))
                fields = _fields(shape, block.stop - block.start, 1000 * number + seed + 10)
                writer.write(block, name, (mean + deviation * fields).astype(np.float32))


def _fields(shape: tuple[int, int], hours: int, seed: int) -> np.ndarray:
    """Return fields float32 [hours, H, W], of order 1."""
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((1, 1, hours // 6 + 2, max(2, shape[0] // 8), max(2, shape[1] // 8)))
    smooth = torch.nn.functional.interpolate(torch.from_numpy(coarse).float(), size=(hours, *shape), mode="trilinear")
    values = smooth[0, 0].numpy() + 0.02 * rng.standard_normal((hours, *shape), np.float32)
    if hours > 1:
        values[rng.random(values.shape, np.float32) < 0.02] = np.nan
    return values


def _write_hourly(store: Path, output: Path) -> None:
    import xarray as xr

    output.mkdir()
    with xr.open_zarr(store, chunks=None, consolidated=False) as dataset, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr warns that consolidated metadata are not part of format 3 yet
        for name in dataset.variables:
            dataset[name].encoding = {}
        chunks = {name: {"chunks": (1, *dataset[name].shape[1:])} for name in DYNAMIC}
        dataset.to_zarr(output / store.name, encoding=chunks, consolidated=True)
