"""A gridded data set as one series of hours, whatever files it lies in."""

import hashlib
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

from topoflow.data.grid import Grid, same_place
from topoflow.data.stores import Store, StoreContent, find_stores, inspect_store, read_times
from topoflow.data.variables import VARIABLES
from topoflow.errors import DataError

logger = logging.getLogger(__name__)

IN_MEMORY_LIMIT_BYTES = 2 * 2**30
"""Fields are held in memory up to this size unless the config says otherwise."""

_BLOCK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class SourceIndex:
    """All of a data set but its fields that change in time: a value that another process can be sent.

    stores: in the order of time. grid: with the static fields that were asked for. dynamic: names of the fields that
    change in time. fingerprint: hex SHA-256 of what the data are, wherever they lie.
    """

    stores: tuple[Store, ...]
    grid: Grid
    dynamic: tuple[str, ...]
    fingerprint: str


class GriddedSource:
    """Physical fields by name and hour. Built by `open_source` and `open_indexed`.

    times: datetime64[h] [T], strictly increasing over all files. grid, dynamic, fingerprint: those of the index.
    In memory or not, the same values come out. Handles are opened at the first read; `close` before forking, since
    those of HDF5 are not made to be shared.
    """

    def __init__(self, index: SourceIndex):
        self.times = np.concatenate([store.times for store in index.stores])
        self.grid, self.dynamic, self.fingerprint = index.grid, index.dynamic, index.fingerprint
        self._stores = index.stores
        self._first = np.cumsum([0] + [len(store.times) for store in index.stores])
        self._handles: dict[int, xr.Dataset] = {}
        self._fields: np.ndarray | None = None  # [T, D, H, W] once loaded

    @property
    def in_memory(self) -> bool:
        """Whether the fields are held in memory."""
        return self._fields is not None

    @property
    def size_bytes(self) -> int:
        """What all dynamic fields take as float32."""
        return 4 * len(self.times) * len(self.dynamic) * self.grid.lat2d.size

    def read(self, name: str, indices: np.ndarray | Sequence[int] | slice) -> np.ndarray:
        """float32 [n, H, W] of dynamic variable `name` at `indices` of `times`, physical units, NaN where missing."""
        indices = np.arange(len(self.times))[indices]
        if self._fields is not None:
            return self._fields[indices, self.dynamic.index(name)]
        values = np.empty((len(indices), *self.grid.shape), np.float32)
        store_of = np.searchsorted(self._first, indices, side="right") - 1
        for store in np.unique(store_of):
            chosen = np.flatnonzero(store_of == store)
            wanted, back = np.unique(indices[chosen] - self._first[store], return_inverse=True)
            contiguous = len(wanted) == wanted[-1] - wanted[0] + 1
            selection = slice(int(wanted[0]), int(wanted[-1]) + 1) if contiguous else wanted
            values[chosen] = read_times(self._open(store), name, selection, self._stores[store].path)[back]
        return values

    def snapshot(self, names: Sequence[str], index: int) -> np.ndarray:
        """float32 [len(names), H, W]: the dynamic variables `names` at hour `index` of `times`, a copy."""
        if self._fields is not None:
            return self._fields[index, [self.dynamic.index(name) for name in names]]
        store = int(np.searchsorted(self._first, index, side="right")) - 1
        dataset, path, position = self._open(store), self._stores[store].path, int(index - self._first[store])
        values = np.empty((len(names), *self.grid.shape), np.float32)
        for row, name in enumerate(names):
            values[row] = read_times(dataset, name, slice(position, position + 1), path)[0]
        return values

    def static(self, name: str) -> np.ndarray:
        """float32 [H, W]: `elevation` (m), `population`, `lat2d` or `lon2d` (degrees)."""
        field = {
            "elevation": self.grid.elevation_m,
            "population": self.grid.population,
            "lat2d": self.grid.lat2d,
            "lon2d": self.grid.lon2d,
        }[name]
        assert field is not None, f"the source was opened without {name}"
        return field.astype(np.float32)

    def blocks(self, indices: np.ndarray) -> list[np.ndarray]:
        """Increasing `indices` cut into unbroken runs of a bounded number of hours, the same on every machine."""
        hours = max(1, _BLOCK_BYTES // (4 * self.grid.lat2d.size))
        runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
        return [run[start : start + hours] for run in runs for start in range(0, len(run), hours)]

    def load(self) -> None:
        """Read all dynamic fields into memory."""
        fields = np.empty((len(self.times), len(self.dynamic), *self.grid.shape), np.float32)
        for block in self.blocks(np.arange(len(self.times))):
            for column, name in enumerate(self.dynamic):
                fields[block[0] : block[-1] + 1, column] = self.read(name, block)
        self._fields = fields
        self.close()

    def close(self) -> None:
        """Close what this process has open; the next read opens it again."""
        for dataset in self._handles.values():
            dataset.close()
        self._handles = {}

    def _open(self, store: int) -> xr.Dataset:
        if store not in self._handles:
            self._handles[store] = self._stores[store].open()
        return self._handles[store]

    def compute_fingerprint(self) -> str:
        """SHA-256 over names, units, shape, times, coordinates, static fields and three hours of every field.

        Those hours are read by this process, whoever made the index.
        """
        digest = hashlib.sha256()

        def add(label: str, values: np.ndarray, dtype: str) -> None:
            # one NaN for all: files may hold any of the many bit patterns
            values = np.where(np.isnan(values), np.nan, values) if dtype == "<f4" else values
            digest.update(f"{label} {values.shape} {dtype};".encode())
            digest.update(np.ascontiguousarray(values, dtype).tobytes())

        add("times", self.times.astype(np.int64), "<i8")
        # rounded to the float32 grid of about 1e-5 degrees in which many files store their coordinates
        add("lat2d", self.grid.lat2d, "<f4")
        add("lon2d", self.grid.lon2d, "<f4")
        if self.grid.elevation_m is not None:
            add("elevation m", self.grid.elevation_m, "<f4")
        if self.grid.population is not None:
            add("population 1", self.grid.population, "<f4")
        hours = [0, len(self.times) // 2, len(self.times) - 1]
        for name in sorted(self.dynamic):
            add(f"{name} {VARIABLES[name].unit}", self.read(name, hours), "<f4")
        self.close()
        return digest.hexdigest()


def open_source(path: str, variables: Sequence[str], in_memory: bool | None = None) -> GriddedSource:
    """`index_source` and `open_indexed` in one process."""
    return open_indexed(index_source(path, variables), in_memory)


def open_indexed(index: SourceIndex, in_memory: bool | None = None) -> GriddedSource:
    """The data set of an index that this or another process made; no metadata are looked at.

    `in_memory`: hold the dynamic fields; None: if they take at most 2 GiB. Raises DataError, naming the file.
    """
    source = GriddedSource(index)
    if in_memory or (in_memory is None and source.size_bytes <= IN_MEMORY_LIMIT_BYTES):
        source.load()
    return source


def index_source(path: str, variables: Sequence[str]) -> SourceIndex:
    """Look at the data set at `path` for the dynamic and static `variables` (computed ones may be named).

    Stores in a folder must agree in grid and static fields and not overlap in time. A units attribute that is absent
    is logged and taken to be what is expected. Raises MissingPath and DataError, naming the file (see
    `topoflow.data.stores`).
    """
    dynamic = tuple(dict.fromkeys(name for name in variables if VARIABLES[name].kind == "dynamic"))
    static = tuple(dict.fromkeys(name for name in variables if VARIABLES[name].kind == "static"))
    contents = [inspect_store(store, dynamic, static) for store in find_stores(path)]
    contents.sort(key=lambda content: content.store.times[0])
    _check_agreement(contents)
    without_units = sorted({name for content in contents for name in content.without_units})
    if without_units:
        expected = ", ".join(f"{name} in {VARIABLES[name].unit}" for name in without_units)
        logger.warning("%s: no units attribute; taken to be %s", path, expected)
    first = contents[0]
    grid = Grid(
        first.grid.lat2d,
        first.grid.lon2d,
        first.grid.north_first,
        elevation_m=first.statics.get("elevation"),
        population=first.statics.get("population"),
    )
    index = SourceIndex(tuple(content.store for content in contents), grid, dynamic, fingerprint="")
    return replace(index, fingerprint=GriddedSource(index).compute_fingerprint())


def _check_agreement(contents: Sequence[StoreContent]) -> None:
    first = contents[0]
    for before, content in itertools.pairwise(contents):
        store, earlier = content.store, before.store
        if store.times[0] <= earlier.times[-1]:
            raise DataError(
                f"data.path: {store.path} begins at {store.times[0]}, {earlier.path} ends at {earlier.times[-1]}: "
                "expected stores that do not overlap in time"
            )
        if not (same_place(content.grid.lat2d, first.grid.lat2d) and same_place(content.grid.lon2d, first.grid.lon2d)):
            raise DataError(
                f"data.path: {store.path} ({_extent(content.grid)}) and {first.store.path} ({_extent(first.grid)}) "
                "disagree in grid"
            )
        for name, field in content.statics.items():
            if not np.array_equal(field, first.statics[name], equal_nan=True):
                raise DataError(f"data.path: {store.path} and {first.store.path} disagree in variable {name!r}")


def _extent(grid: Grid) -> str:
    rows, columns = grid.shape
    lats = f"lat {grid.lat2d[0, 0]:g} to {grid.lat2d[-1, 0]:g}"
    return f"{rows} x {columns} cells, {lats}, lon {grid.lon2d[0, 0]:g} to {grid.lon2d[0, -1]:g}"
