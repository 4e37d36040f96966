"""The files of a gridded data set: finding them, opening them, and refusing those that are not usable."""

import json
import os
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from topoflow.data.grid import Grid, build_grid, same_place
from topoflow.data.variables import VARIABLES, same_unit
from topoflow.data.zarr_chunks import ChunkedArray, chunked_array
from topoflow.errors import DataError, MissingPath

if TYPE_CHECKING:  # it takes half a second to import, and packed data do not need it
    import xarray as xr

_YEARLY_STORE = re.compile(r"data_\d{4}.*\.zarr")
_ZARR_METADATA = ("zarr.json", ".zgroup", ".zmetadata", ".zarray", ".zattrs")
_UNREADABLE = (OSError, ValueError, KeyError, RuntimeError)
"""What xarray and the libraries under it raise for a file that is broken or of another kind."""


@dataclass(frozen=True)
class Store:
    """One store as it was found. It can be sent to another process, which opens the store from it.

    times: datetime64[h] [T], strictly increasing. handle: xarray's pickle of the opened store. A Zarr store opened from
    it does not read its metadata again, of which there is a file per variable; NetCDF is opened again. arrays: by name,
    the variables whose chunks hold plain values, which can be read without xarray.
    """

    path: Path
    times: np.ndarray
    handle: bytes
    arrays: dict[str, ChunkedArray]

    def open(self) -> "OpenStore":
        """The store, opened. DataError if it is not here, as on a node that does not see the file system."""
        # checked here, because missing chunks of a Zarr array would read as missing values
        if not self.path.exists():
            raise DataError(
                f"data.path: {self.path} does not exist on this machine: expected the same stores on all ranks"
            )
        return OpenStore(self)

    def guard(self) -> list[str]:
        """Sizes and times of change of a NetCDF file, or of a Zarr store's metadata and the folders of its chunks."""
        if self.path.is_file():
            return [_file_state(self.path)]
        folders = [self.path, *sorted(entry for entry in self.path.iterdir() if entry.is_dir())]
        entries = (folder / name for folder in folders for name in ("", *_ZARR_METADATA, "c"))
        return [_file_state(entry) for entry in entries if entry.exists()]

    def file_states(self) -> list[str]:
        """Sizes and times of change of every file of the store."""
        if self.path.is_file():
            return [_file_state(self.path)]
        inside = (Path(folder, name) for folder, _, names in os.walk(self.path) for name in names)
        return sorted(map(_file_state, inside))


class OpenStore:
    """A store that fields are read from; xarray opens it when the first of them needs decoding."""

    def __init__(self, store: Store):
        self._store = store
        self._dataset: xr.Dataset | None = None

    def read(self, name: str, indices: np.ndarray) -> np.ndarray:
        """float32 [n, H, W] of dynamic variable `name` at increasing positions `indices` [n], NaN where missing."""
        array = self._store.arrays.get(name)
        with self._refusals(name):
            values = self._read_decoded(name, indices) if array is None else array.read(indices)
        values = values.astype(np.float32, copy=False)
        self._refuse_infinite((name,), values[None])
        return values

    def read_hour(self, names: Sequence[str], position: int, out: np.ndarray) -> None:
        """Put the dynamic variables `names` at `position` into `out`, float32 [len(names), H, W]."""
        for name, field in zip(names, out, strict=True):
            array = self._store.arrays.get(name)
            with self._refusals(name):
                if array is None:
                    field[:] = self._read_decoded(name, np.array([position]))[0]
                else:
                    array.read_hour(position, field)
        self._refuse_infinite(names, out)

    def _refuse_infinite(self, names: Sequence[str], fields: np.ndarray) -> None:
        """fields: [len(names), ...]."""
        if np.isinf(fields).any():
            name = next(name for name, field in zip(names, fields, strict=True) if np.isinf(field).any())
            raise DataError(
                f"data.path: {self._store.path}: variable {name!r} has infinite values: expected numbers, or NaN "
                "where missing"
            )

    @contextmanager
    def _refusals(self, name: str) -> Iterator[None]:
        try:
            yield
        except _UNREADABLE as error:
            reason = f"data.path: {self._store.path}: variable {name!r} cannot be read: {error}"
            raise DataError(reason.splitlines()[0]) from error

    def close(self) -> None:
        """Close what is open."""
        if self._dataset is not None:
            self._dataset.close()
        self._dataset = None

    def _read_decoded(self, name: str, indices: np.ndarray) -> np.ndarray:
        dataset = self._dataset
        if dataset is None:
            dataset = self._dataset = pickle.loads(self._store.handle)
        variable = dataset.variables[name]
        _, rows, columns = _spatial_dims(variable, name, self._store.path)
        contiguous = len(indices) == indices[-1] - indices[0] + 1
        selection = slice(int(indices[0]), int(indices[-1]) + 1) if contiguous else indices
        return variable.isel(time=selection).transpose("time", rows, columns).values


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
            f"data.path: {path} contains both Zarr ({zarr[0].name}) and NetCDF ({netcdf[0].name}): expected one kind"
        )
    if not zarr and not netcdf:
        raise DataError(f"data.path: {path} contains no store: expected data_YYYY*.zarr or *.nc")
    return zarr or netcdf


def open_store(path: Path) -> "xr.Dataset":
    """The store at `path`, opened through xarray without reading its fields. DataError if it cannot be opened."""
    return _open(path)[0]


def _open(path: Path) -> tuple["xr.Dataset", Mapping[str, Any]]:
    """The opened store and, of Zarr, the arrays under it, whose metadata are read once for both."""
    import xarray as xr
    from xarray.backends import ZarrStore

    try:
        if not path.is_dir():
            return xr.open_dataset(path, engine="netcdf4", chunks=None), {}
        store = ZarrStore.open_group(path, mode="r", consolidated=_is_consolidated(path))
        return xr.open_dataset(store, engine="store", chunks=None), store.members
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"data.path: {path} cannot be opened as {'Zarr' if path.is_dir() else 'NetCDF'}: {reason}"
        ) from error


def inspect_store(path: Path, dynamic: tuple[str, ...], static: tuple[str, ...]) -> StoreContent:
    """Check the store at `path` against what is needed of it and read all but the dynamic fields.

    Raises DataError, naming `path`, for a missing variable or coordinate, dimensions or units other than expected,
    times that are not increasing whole hours, and static fields with NaN in elevation or infinite values.
    """
    dataset, members = _open(path)
    with dataset:
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
        plain = (name for name in dynamic if _is_undecoded(dataset.variables[name], layouts[name]))
        found = {name: chunked_array(members[name], path / name) for name in plain if name in members}
        arrays = {name: array for name, array in found.items() if array is not None}
    return StoreContent(Store(path, times, handle, arrays), grid, statics, without_units)


def _is_consolidated(path: Path) -> bool:
    if (path / "zarr.json").exists():
        return "consolidated_metadata" in json.loads((path / "zarr.json").read_text())
    return (path / ".zmetadata").exists()


def _is_undecoded(variable: "xr.Variable", dims: tuple[str, ...]) -> bool:
    """Whether xarray gives the variable as the files have it: in our order `dims`, unscaled, of the same type, with no
    mark of missing values but NaN."""
    coding = variable.encoding
    marks = [coding[key] for key in ("_FillValue", "missing_value") if key in coding]
    is_scaled = not coding.keys().isdisjoint(("scale_factor", "add_offset", "_Unsigned"))
    is_kept = variable.dims == dims and variable.dtype == coding.get("dtype")
    return is_kept and not is_scaled and bool(np.isnan(np.array(marks, float)).all())


def _file_state(path: Path) -> str:
    state = os.stat(path)
    return f"{path.parent.name}/{path.name} {0 if path.is_dir() else state.st_size} {state.st_mtime_ns}"


def _spatial_dims(variable: "xr.Variable", name: str, path: Path) -> tuple[str, ...]:
    """The variable's dimensions in our order: ("time", rows, columns), or (rows, columns) of a static one."""
    leading = ("time",) if VARIABLES[name].kind == "dynamic" else ()
    for rows, columns in (("lat", "lon"), ("y", "x")):
        if set(variable.dims) == {*leading, rows, columns} and len(variable.dims) == len(leading) + 2:
            return (*leading, rows, columns)
    wanted = ", ".join((*leading, "lat", "lon"))
    raise DataError(f"data.path: {path}: variable {name!r} has dimensions {variable.dims}: expected ({wanted})")


def _check_units(variable: "xr.Variable", name: str, path: Path) -> None:
    if variable.dtype.kind not in "iuf":
        raise DataError(f"data.path: {path}: variable {name!r} is of type {variable.dtype}: expected numbers")
    found, expected = variable.attrs.get("units"), VARIABLES[name].unit
    if found is not None and not same_unit(str(found), expected):
        raise DataError(
            f"data.path: {path}: variable {name!r} has units {str(found)!r}: expected {expected!r} "
            "(convert the values and the attribute)"
        )


def _times(dataset: "xr.Dataset", path: Path) -> np.ndarray:
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
        raise DataError(f"data.path: {path}: time {after} follows {before}: expected strictly increasing times")
    return hours


def _coordinates(dataset: "xr.Dataset", rows: str, columns: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
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
            raise DataError(f"data.path: {path}: coordinates lat, lon and lat2d, lon2d describe different places")
        return regular[0], regular[1]
    if len(two_dimensional) == 2:
        return two_dimensional[0], two_dimensional[1]
    missing = "lat" if not {"lat", "lat2d"} & set(dataset.variables) else "lon"
    raise DataError(
        f"data.path: {path} has no usable coordinate {missing!r}: expected lat({rows}) and lon({columns}), "
        f"or lat2d and lon2d on ({rows}, {columns})"
    )


def _static_field(variable: "xr.Variable", name: str, rows: str, columns: str, path: Path) -> np.ndarray:
    values = variable.transpose(rows, columns).values.astype(np.float32)
    if np.isinf(values).any():
        raise DataError(f"data.path: {path}: variable {name!r} has infinite values")
    empty = int(np.isnan(values).sum())
    if name == "elevation" and empty:
        raise DataError(
            f"data.path: {path}: variable 'elevation' has no value in {empty} of {values.size} cells: "
            "expected metres in each, 0 over the sea"
        )
    return values
