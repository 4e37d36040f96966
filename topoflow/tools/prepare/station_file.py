"""One file of station observations (CF timeSeries): what it holds, and in which units."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

from topoflow.data.variables import VARIABLES, unit_conversion
from topoflow.errors import DataError, MissingPath


@dataclass(frozen=True)
class StationFile:
    """One opened input. `times` datetime64[h] [T]; `lat`, `lon` [S] degrees; `elevation_m` [S] or None."""

    path: Path
    dataset: xr.Dataset
    station_dim: str
    times: np.ndarray
    lat: np.ndarray
    lon: np.ndarray
    elevation_m: np.ndarray | None
    conversions: Mapping[str, tuple[float, float]]
    """{variable: (factor, offset)} of the variables that the format knows."""
    skipped: tuple[str, ...]

    def read(self, name: str, rows: slice, stations: np.ndarray) -> np.ndarray:
        """Values of `name` in our unit at the times of `rows` and the given stations: float64 [n, S'], NaN missing."""
        factor, offset = self.conversions[name]
        values = self.dataset[name].isel(time=rows).transpose("time", self.station_dim).values
        return values[:, stations].astype("float64") * factor + offset


def open_station_file(path: Path) -> StationFile:
    """Open and check a CF timeSeries file; see `stations.grid_stations` for its content and the errors raised."""
    dataset = open_netcdf(path)
    for name in ("lat", "lon"):
        if name not in dataset.variables or dataset[name].ndim != 1:
            raise DataError(f"{path}: no `{name}` over the stations: expected a CF timeSeries file (time, station)")
    station_dim = str(dataset["lat"].dims[0])
    lat, lon = (dataset[name].values.astype("float64") for name in ("lat", "lon"))
    if dataset["lon"].dims != (station_dim,) or station_dim == "time":
        raise DataError(f"{path}: lat and lon are not over one station dimension: found {dict(dataset.sizes)}")
    if not (np.isfinite(lat).all() and np.isfinite(lon).all()):
        raise DataError(f"{path}: {(~np.isfinite(lat + lon)).sum()} stations have no position: expected lat and lon")
    series = [str(name) for name in dataset.data_vars if set(dataset[name].dims) == {"time", station_dim}]
    known = [name for name in series if name in VARIABLES and VARIABLES[name].kind == "dynamic"]
    if not known:
        raise DataError(f"{path}: no known variable over (time, {station_dim}): found {series}")
    elevation_m = None
    if "elevation" in dataset.variables and dataset["elevation"].dims == (station_dim,):
        factor, offset = conversion(path, "elevation", dataset["elevation"].attrs.get("units"))
        elevation_m = dataset["elevation"].values.astype("float64") * factor + offset
    return StationFile(
        path,
        dataset,
        station_dim,
        _hours(path, dataset),
        lat,
        lon,
        elevation_m,
        {name: conversion(path, name, dataset[name].attrs.get("units")) for name in known},
        tuple(name for name in series if name not in known),
    )


def conversion(path: Path, name: str, unit: str | None) -> tuple[float, float]:
    """(factor, offset) that turn values of variable `name` in `unit` into its unit in the format; DataError if none."""
    expected = VARIABLES[name].unit
    if unit is None:
        raise DataError(f"{path}: variable {name} has no attribute units: expected one that converts to {expected!r}")
    try:
        return unit_conversion(unit, expected)
    except DataError as error:
        raise DataError(f"{path}: variable {name}: {error}") from error


def open_netcdf(path: Path) -> xr.Dataset:
    if not path.exists():
        raise MissingPath(f"{path}: no such file")
    try:
        return xr.open_dataset(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as NetCDF: {error}") from error


def _hours(path: Path, dataset: xr.Dataset) -> np.ndarray:
    if "time" not in dataset.coords or dataset["time"].dtype.kind != "M":
        raise DataError(f"{path}: no usable `time`: expected CF times in the standard calendar")
    times = dataset["time"].values
    hours = times.astype("datetime64[h]")
    if (hours != times).any():
        raise DataError(f"{path}: time {times[hours != times][0]} is not a whole hour")
    backward = np.diff(hours) <= np.timedelta64(0, "h")
    if backward.any():
        raise DataError(f"{path}: times do not increase at {hours[1:][backward][0]}")
    return hours
