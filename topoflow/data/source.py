"""A gridded data set in NetCDF or Zarr stores, and functions that open a data set of any kind."""

import itertools
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from topoflow.data.fields import FieldSource
from topoflow.data.grid import Grid, same_place
from topoflow.data.packed.manifest import read_manifest
from topoflow.data.packed.reader import PackedIndex, PackedSource, index_packed, is_packed
from topoflow.data.stores import OpenStore, Store, StoreContent, find_stores, inspect_store, open_store
from topoflow.data.variables import VARIABLES
from topoflow.errors import DataError

logger = logging.getLogger(__name__)

IN_MEMORY_LIMIT_BYTES = 2 * 2**30
"""Fields in stores are held in memory up to this size unless the config says otherwise."""


@dataclass(frozen=True)
class SourceIndex:
    """All of a data set in stores but its fields that change in time: a value that another process can be sent.

    stores: in the order of time. grid: with the static fields that were asked for. dynamic: names of the fields that
    change in time. fingerprint: hex SHA-256 of what the data are, wherever they lie.
    """

    stores: tuple[Store, ...]
    grid: Grid
    dynamic: tuple[str, ...]
    fingerprint: str


class GriddedSource(FieldSource):
    """The fields of stores, read through xarray or, where that is the same, straight from the chunks of Zarr.

    One thread reads at a time: HDF5 allows no more.
    """

    def __init__(self, index: SourceIndex):
        times = np.concatenate([store.times for store in index.stores])
        super().__init__(times, index.grid, index.dynamic, index.fingerprint)
        self._stores = index.stores
        self._first = np.cumsum([0] + [len(store.times) for store in index.stores])
        self._handles: dict[int, OpenStore] = {}
        self._lock = threading.Lock()

    @property
    def where(self) -> str:
        return "in memory" if self.in_memory else "read from disk at each sample"

    def close(self) -> None:
        with self._lock:
            for store in self._handles.values():
                store.close()
            self._handles = {}

    def guard(self) -> list[str]:
        return [line for store in self._stores for line in store.guard()]

    def file_states(self, first: int, stop: int) -> list[str]:
        held = zip(self._stores, self._first[:-1], self._first[1:], strict=True)
        return [state for store, begin, end in held if begin < stop and end > first for state in store.file_states()]

    def _read(self, name: str, indices: np.ndarray) -> np.ndarray:
        values = np.empty((len(indices), *self.grid.shape), np.float32)
        store_of = np.searchsorted(self._first, indices, side="right") - 1
        for store in np.unique(store_of):
            chosen = np.flatnonzero(store_of == store)
            wanted, back = np.unique(indices[chosen] - self._first[store], return_inverse=True)
            with self._lock:
                values[chosen] = self._open(int(store)).read(name, wanted)[back]
        return values

    def _read_hour(self, names: tuple[str, ...], index: int) -> np.ndarray:
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        values = np.empty((len(names), *self.grid.shape), np.float32)
        with self._lock:
            self._open(number).read_hour(names, index - int(self._first[number]), values)
        return values

    def _open(self, store: int) -> OpenStore:
        if store not in self._handles:
            self._handles[store] = self._stores[store].open()
        return self._handles[store]


def open_source(path: str, variables: Sequence[str], in_memory: bool | None = None) -> FieldSource:
    """`index_source` and `open_indexed` in one process."""
    return open_indexed(index_source(path, variables), in_memory)


def open_indexed(index: SourceIndex | PackedIndex, in_memory: bool | None = None) -> FieldSource:
    """The data set of an index that this or another process made; no metadata are read.

    `in_memory`: hold the dynamic fields; None: if they lie in stores and take at most 2 GiB. Packed data are mapped:
    the processes of a node share what the operating system keeps of them. Raises DataError, naming the file.
    """
    if isinstance(index, PackedIndex):
        source: FieldSource = PackedSource(index)
        fits = False
    else:
        source = GriddedSource(index)
        fits = source.size_bytes <= IN_MEMORY_LIMIT_BYTES
    if in_memory or (in_memory is None and fits):
        source.load()
    return source


def index_source(path: str, variables: Sequence[str]) -> SourceIndex | PackedIndex:
    """Look at the data set at `path`, packed or in stores, for `variables` (see `index_stores`, `index_packed`)."""
    if is_packed(Path(path)):
        index = index_packed(Path(path), variables)
        return replace(index, fingerprint=PackedSource(index).compute_fingerprint())
    return index_stores(path, variables)


def held_variables(path: str) -> tuple[str, ...]:
    """Names of the dynamic and static variables that the data set at `path` has; of stores, the first. As
    `index_source` raises."""
    if is_packed(Path(path)):
        manifest = read_manifest(Path(path))
        held = {*manifest.statics, *(variable.name for variable in manifest.variables)}
    else:
        with open_store(find_stores(path)[0]) as dataset:
            held = set(map(str, dataset.variables))
    return tuple(name for name, variable in VARIABLES.items() if name in held and variable.kind != "computed")


def index_stores(path: str, variables: Sequence[str]) -> SourceIndex:
    """Look at the stores of `path` for the dynamic and static `variables` (computed ones may be named).

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
        logger.warning("%s: no units attribute; assuming %s", path, expected)
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
                f"data.path: {store.path} starts at {store.times[0]}, {earlier.path} ends at {earlier.times[-1]}: "
                "expected stores that do not overlap in time"
            )
        if not (same_place(content.grid.lat2d, first.grid.lat2d) and same_place(content.grid.lon2d, first.grid.lon2d)):
            raise DataError(
                f"data.path: {store.path} ({_extent(content.grid)}) and {first.store.path} ({_extent(first.grid)}) "
                "have different grids"
            )
        for name, field in content.statics.items():
            if not np.array_equal(field, first.statics[name], equal_nan=True):
                raise DataError(f"data.path: {store.path} and {first.store.path} differ in variable {name!r}")


def _extent(grid: Grid) -> str:
    rows, columns = grid.shape
    lats = f"lat {grid.lat2d[0, 0]:g} to {grid.lat2d[-1, 0]:g}"
    return f"{rows} x {columns} cells, {lats}, lon {grid.lon2d[0, 0]:g} to {grid.lon2d[0, -1]:g}"
