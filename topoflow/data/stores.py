"""The files of a gridded data set: finding them, opening them, and refusing those that are not what they should be."""

import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

from topoflow.data.grid import Grid, build_grid, same_place
from topoflow.data.variables import VARIABLES, same_unit
from topoflow.errors import DataError, MissingPath

_YEARLY_STORE = re.compile(r"data_\d{4}.*\.zarr")
_ZARR_METADATA = ("zarr.json", ".zgroup", ".zmetadata")
_UNREADABLE = (OSError, ValueError, KeyError, RuntimeError)
"""What xarray and the libraries under it raise for a file that is broken or of another kind."""


@dataclass(frozen=True)
class Store:
    """One store as it was found: a value that another process can be sent, and opens it from.

    times: datetime64[h] [T], strictly increasing. handle: what xarray pickles of the opened store. Opened from it, a
    Zarr store costs no look at its metadata, of which there is a file for each variable; NetCDF is opened again.
    """

    path: Path
    times: np.ndarray
    handle: bytes

    def open(self) -> xr.Dataset:
        """The store, opened. DataError if it is not here, as on a node that does not see the file system."""
        # looked for, since the parts of a Zarr array that are not there read as missing values
        if not self.path.exists():
            raise DataError(f"data.path: {self.path} does not exist here: expected the store that the run began with")
        return pickle.loads(self.handle)


@dataclass(frozen=True)
class StoreContent:
    """What one store was found to hold; nothing of it stays open.

    grid: without static fields. statics: float32 [H, W] by name. without_units: the variables whose units attribute is
    absent.
    """

    store: Store
    grid: Grid
    statics: dict[str, np.ndarray]
    without_units: tuple[str, ...]


def find_stores(path: str) -> list[Path]:
    """The stores of the data set at `path`, by name: those of a folder, or `path` itself.

    Raises MissingPath if there is nothing at `path`, DataError for a folder without stores or with both kinds.
    """
    root = Path(path)
    if not root.exists():
        raise MissingPath(
            f"data.path: {path} does not exist: expected a folder of stores, a Zarr store or a NetCDF file"
        )
    if root.is_file() or any((root / name).exists() for name in _ZARR_METADATA):
        return [root]
    zarr = sorted(child for child in root.iterdir() if _YEARLY_STORE.fullmatch(child.name))
    netcdf = sorted(root.glob("*.nc"))
    if zarr and netcdf:
        raise DataError(
            f"data.path: {path} holds Zarr ({zarr[0].name}) and NetCDF ({netcdf[0].name}): expected one kind"
        )
    if not zarr and not netcdf:
        raise DataError(f"data.path: {path} holds no store: expected data_YYYY*.zarr or *.nc")
    return zarr or netcdf


def open_store(path: Path) -> xr.Dataset:
    """The store at `path`, opened through xarray without reading its fields. DataError if it cannot be opened."""
    try:
        if path.is_dir():
            return xr.open_zarr(path, chunks=None, consolidated=_is_consolidated(path))
        return xr.open_dataset(path, engine="netcdf4", chunks=None)
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"data.path: {path} cannot be opened as {'Zarr' if path.is_dir() else 'NetCDF'}: {reason}"
        ) from error


def read_times(dataset: xr.Dataset, name: str, indices: slice | np.ndarray, path: Path) -> np.ndarray:
    """float32 [n, H, W] of dynamic variable `name` at positions `indices` of this store, NaN where missing."""
    variable = dataset.variables[name]
    _, rows, columns = _spatial_dims(variable, name, path)
    try:
        values = variable.isel(time=indices).transpose("time", rows, columns).values
    except _UNREADABLE as error:
        raise DataError(f"data.path: {path}: variable {name!r} cannot be read: {error}".splitlines()[0]) from error
    values = values.astype(np.float32, copy=False)
    if np.isinf(values).any():
        raise DataError(
            f"data.path: {path}: variable {name!r} holds infinite values: expected numbers, or NaN for none"
        )
    return values


def inspect_store(path: Path, dynamic: tuple[str, ...], static: tuple[str, ...]) -> StoreContent:
    """Check the store at `path` against what is needed of it and read all but the dynamic fields.

    Raises DataError, naming `path`, for a missing variable or coordinate, dimensions or units other than expected,
    times that are not increasing whole hours, and static fields with NaN in elevation or infinite values.
    """
    with open_store(path) as dataset:
        handle = pickle.dumps(dataset)  # without its fields: none has been read
        for name in (*dynamic, *static):
            if name not in dataset.variables:
                held = ", ".join(sorted(map(str, dataset.data_vars))) or "none"
                raise DataError(f"data.path: {path} has no variable {name!r}: it has {held}")
            _check_units(dataset.variables[name], name, path)
        layouts = {name: _spatial_dims(dataset.variables[name], name, path) for name in (*dynamic, *static)}
        spatial = {dims[-2:] for dims in layouts.values()} or {("lat", "lon")}
        if len(spatial) > 1:
            raise DataError(f"data.path: {path} has variables on different dimensions: {sorted(spatial)}")
        rows, columns = spatial.pop()
        times = _times(dataset, path)
        grid = build_grid(*_coordinates(dataset, rows, columns, path), where=f"data.path: {path}")
        statics = {name: _static_field(dataset.variables[name], name, rows, columns, path) for name in static}
        without_units = tuple(name for name in (*dynamic, *static) if "units" not in dataset.variables[name].attrs)
    return StoreContent(Store(path, times, handle), grid, statics, without_units)


def _is_consolidated(path: Path) -> bool:
    if (path / "zarr.json").exists():
        return "consolidated_metadata" in json.loads((path / "zarr.json").read_text())
    return (path / ".zmetadata").exists()


def _spatial_dims(variable: xr.Variable, name: str, path: Path) -> tuple[str, ...]:
    """The variable's dimensions in our order: ("time", rows, columns), or (rows, columns) of a static one."""
    leading = ("time",) if VARIABLES[name].kind == "dynamic" else ()
    for rows, columns in (("lat", "lon"), ("y", "x")):
        if set(variable.dims) == {*leading, rows, columns} and len(variable.dims) == len(leading) + 2:
            return (*leading, rows, columns)
    wanted = ", ".join((*leading, "lat", "lon"))
    raise DataError(f"data.path: {path}: variable {name!r} has dimensions {variable.dims}: expected ({wanted})")


def _check_units(variable: xr.Variable, name: str, path: Path) -> None:
    if variable.dtype.kind not in "iuf":
        raise DataError(f"data.path: {path}: variable {name!r} is of type {variable.dtype}: expected numbers")
    found, expected = variable.attrs.get("units"), VARIABLES[name].unit
    if found is not None and not same_unit(str(found), expected):
        raise DataError(
            f"data.path: {path}: variable {name!r} has units {str(found)!r}: expected {expected!r} "
            "(convert the values and the attribute)"
        )


def _times(dataset: xr.Dataset, path: Path) -> np.ndarray:
    if "time" not in dataset.variables:
        raise DataError(f"data.path: {path} has no coordinate 'time'")
    values = dataset.variables["time"].values
    if values.ndim != 1 or values.size == 0 or values.dtype.kind != "M":
        raise DataError(
            f"data.path: {path}: coordinate 'time' has type {values.dtype} and shape {values.shape}: "
            "expected at least one date of the standard calendar"
        )
    hours = values.astype("datetime64[h]")
    whole = hours == values  # NaT is unequal to itself
    if not whole.all():
        raise DataError(f"data.path: {path}: time {values[~whole][0]} is not a whole hour")
    step_back = np.flatnonzero(np.diff(hours) <= np.timedelta64(0, "h"))
    if step_back.size:
        before, after = hours[step_back[0]], hours[step_back[0] + 1]
        raise DataError(f"data.path: {path}: time {after} follows {before}: expected increasing times, none twice")
    return hours


def _coordinates(dataset: xr.Dataset, rows: str, columns: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(lat2d, lon2d), float64 [H, W] degrees, from lat2d and lon2d if the store has them, else from lat and lon."""
    one_dimensional = [
        dataset.variables[name].values.astype(np.float64)
        for name, dim in (("lat", rows), ("lon", columns))
        if name in dataset.variables and dataset.variables[name].dims == (dim,)
    ]
    two_dimensional = []
    for name, plain in (("lat2d", "lat"), ("lon2d", "lon")):
        for candidate in (name, plain):
            if candidate in dataset.variables and set(dataset.variables[candidate].dims) == {rows, columns}:
                field = dataset.variables[candidate].transpose(rows, columns)
                two_dimensional.append(field.values.astype(np.float64))
                break
    if len(one_dimensional) == 2:
        regular = np.meshgrid(*one_dimensional, indexing="ij")
        if len(two_dimensional) == 2 and not all(map(same_place, regular, two_dimensional)):
            raise DataError(f"data.path: {path}: coordinates lat, lon and lat2d, lon2d stand for different places")
        return regular[0], regular[1]
    if len(two_dimensional) == 2:
        return two_dimensional[0], two_dimensional[1]
    missing = "lat" if not {"lat", "lat2d"} & set(dataset.variables) else "lon"
    raise DataError(
        f"data.path: {path} has no usable coordinate {missing!r}: expected lat({rows}) and lon({columns}), "
        f"or lat2d and lon2d on ({rows}, {columns})"
    )


def _static_field(variable: xr.Variable, name: str, rows: str, columns: str, path: Path) -> np.ndarray:
    values = variable.transpose(rows, columns).values.astype(np.float32)
    if np.isinf(values).any():
        raise DataError(f"data.path: {path}: variable {name!r} holds infinite values")
    empty = int(np.isnan(values).sum())
    if name == "elevation" and empty:
        raise DataError(
            f"data.path: {path}: variable 'elevation' has no value in {empty} of {values.size} cells: "
            "expected metres in each, 0 on the sea"
        )
    return values
