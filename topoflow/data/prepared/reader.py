"""A prepared data set: each hour is one stretch of a file that is mapped into memory."""

import bisect
import hashlib
import io
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from topoflow.data.grid import Grid
from topoflow.data.moments import Moments, is_whole_day
from topoflow.data.prepared.days import hash_field, read_plain_days
from topoflow.data.prepared.manifest import Manifest, check_sizes, is_prepared, read_manifest
from topoflow.errors import DataError, MissingPath

_SERIAL_ELEMENTS = 2**15 - 1
"""torch divides more elements among threads (ATen/TensorIterator.h, GRAIN_SIZE)."""


@dataclass(frozen=True)
class PreparedIndex:
    """All of a prepared data set but its numbers: a value that another process can be sent.

    static: {name: [H, W]}, the fields that do not change. days: of each year, as `read_plain_days` returns them.
    """

    folder: Path
    manifest: Manifest
    static: dict[str, np.ndarray]
    days: tuple[list[dict[str, Any]], ...]


def index_prepared(path: str, key: str = "data.path") -> PreparedIndex:
    """Look at the prepared data set in the folder `path`, which is the value of a key of the config.

    Raises:
        MissingPath: there is no such folder.
        DataError: it is something else, or a file is missing, damaged or of another size; the message names it.
    """
    folder = Path(path)
    if not is_prepared(folder):
        if not folder.exists():
            raise MissingPath(f"{key}: {path} does not exist: expected a folder that `topoflow prepare` wrote")
        raise DataError(
            f"{key}: {path} is not prepared data: expected a folder that "
            f"`python -m topoflow prepare {path} -o OUT` wrote"
        )
    manifest = read_manifest(folder)
    check_sizes(manifest, folder)
    days = tuple(read_plain_days(folder / year.days.name, year.days.sha256) for year in manifest.years)
    return PreparedIndex(folder, manifest, read_static(folder, manifest), days)


def read_static(folder: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """Return the fields that do not change, {name: [H, W]}. DataError if they cannot be read or are damaged."""
    path = folder / manifest.static.name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != manifest.static.sha256:
        raise DataError(f"{path}: is damaged: it does not match its hash in the manifest")
    with np.load(io.BytesIO(data), allow_pickle=False) as fields:
        return {name: fields[name] for name in fields.files}


class PreparedData:
    """The fields of a prepared data set, by name and time, in physical units. Several threads may read at a time.

    What is read lies in the operating system's page cache, once for all processes of a node. DataError if an array is
    missing or has another size.

    Attributes:
        times: datetime64[h] [T], increasing, step_hours apart but for gaps; UTC.
        dynamic: names of the fields that change in time, in the order in which they lie.
        units: {name: unit} of all fields.
        mask: bool [H, W], the cells that count.
    """

    def __init__(self, index: PreparedIndex):
        manifest = index.manifest
        self.folder, self.static_fields = index.folder, index.static
        self.times = np.concatenate([year.times for year in manifest.years])
        self.step_hours = manifest.step_hours
        self.grid = Grid(index.static["lat2d"], index.static["lon2d"])
        self.dynamic = tuple(variable.name for variable in manifest.variables)
        self.units = {**{v.name: v.unit for v in manifest.variables}, **manifest.static_units}
        self.mask = index.static.get("mask", np.ones(self.grid.shape, bool))
        self._manifest = manifest
        scales = [(variable.scale, variable.offset) for variable in manifest.variables]
        self._scale, self._offset = np.array(scales, np.float32).reshape(-1, 2).T[..., None, None]
        self._is_scaled = manifest.dtype != "<f4"
        self._first = np.cumsum([0] + [sum(count for _, count in year.runs) for year in manifest.years])
        # now, because data that are appended to replace the array of their last year
        self._maps = [self._map(number) for number in range(len(manifest.years))]
        self._places: dict[tuple[str, ...], slice | list[int]] = {}
        self._days = {day["day"]: day for year in index.days for day in year}

    def describe(self) -> str:
        """Its extent and form, for the log."""
        size = 4 * len(self.times) * len(self.dynamic) * self.grid.lat2d.size
        step = "hours" if self.step_hours == 1 else f"times every {self.step_hours} hours"
        return (
            f"{self.folder}, {len(self.times)} {step} from {self.times[0]} to {self.times[-1]}, {len(self.dynamic)} "
            f"variables in {size / 1e9:.2f} GB, mapped as {np.dtype(self._manifest.dtype)}"
        )

    def read(self, name: str, indices: np.ndarray | Sequence[int] | slice) -> np.ndarray:
        """float32 [n, H, W] of dynamic variable `name` at `indices` of `times`, NaN where missing."""
        column = self.dynamic.index(name)
        values = self._stored(column, np.arange(len(self.times))[indices]).astype(np.float32)
        if self._is_scaled:
            values *= self._scale[column]
            values += self._offset[column]
        return values

    def at(self, names: tuple[str, ...], index: int) -> np.ndarray:
        """float32 [len(names), H, W]: the dynamic variables `names` at `index` of `times`, NaN where missing.

        It may be a view of the file, so it must not be changed. Names in the order of `dynamic` are read fastest.
        IndexError for an index outside `times`.
        """
        places = self._select(names)
        fields = self._hour(index, places)[places]
        if not self._is_scaled:
            return fields
        # torch converts float16 several times as fast as numpy; the copy is because it needs a writable array
        values = np.empty(fields.shape, np.float32)
        for piece, halves in zip(serial_pieces(values), serial_pieces(fields.copy()), strict=True):
            piece.copy_(halves)
        values *= self._scale[places]
        values += self._offset[places]
        return values

    def at_places(self, names: tuple[str, ...], indices: range, places: np.ndarray) -> np.ndarray:
        """float32 [len(indices), len(places)]: what `at` returns at `indices` of `times`, but only some of its values.

        places: positions in the len(names) * H * W values of an hour.
        """
        cells, selected = self.grid.lat2d.size, self._select(names)
        columns = np.array([self.dynamic.index(name) for name in names])[places // cells]
        stored = columns * cells + places % cells
        values = np.empty((len(indices), len(places)), np.float32)
        for row, index in zip(values, indices, strict=True):
            row[:] = self._hour(index, selected).reshape(-1).take(stored)
        if self._is_scaled:
            values *= self._scale[columns, 0, 0]
            values += self._offset[columns, 0, 0]
        return values

    def static(self, name: str) -> np.ndarray:
        """float32 [H, W]: a field that does not change, `elevation` (m) or `lat2d` (degrees) among them."""
        return self.static_fields[name].astype(np.float32)

    def heights_m(self) -> np.ndarray:
        """float32 [H, W]: terrain height in metres, 0 everywhere where none was prepared (then nothing looks at it)."""
        return self.static("elevation") if "elevation" in self.static_fields else np.zeros(self.grid.shape, np.float32)

    def moments_of_day(self, name: str, piece: np.ndarray) -> Moments | None:
        """Return the moments of `name` over `piece` (positions in `times`), if it is all that there is of a day."""
        if not is_whole_day(self.times, piece):
            return None
        return Moments(*self._days[_day_of(self.times, piece)]["moments"][name])

    def hash_of_day(self, name: str, piece: np.ndarray) -> str:
        """Return a hex SHA-256 of what is stored of `name` at `piece`, positions in `times` within one day.

        It is known for whole days; the hours of part of a day are read.
        """
        if is_whole_day(self.times, piece):
            return self._days[_day_of(self.times, piece)]["sha256"][name]
        return hash_field(self._stored(self.dynamic.index(name), piece))

    def encoding(self, name: str) -> str:
        """How the numbers of a dynamic variable are to be understood: two that differ have different hashes."""
        variable = self._manifest.variables[self.dynamic.index(name)]
        return f"{variable.unit} {self._manifest.dtype} {variable.scale.hex()} {variable.offset.hex()}"

    def _stored(self, column: int, indices: np.ndarray) -> np.ndarray:
        """[n, H, W] in the type of the array."""
        values = np.empty((len(indices), *self.grid.shape), self._manifest.dtype)
        year_of = np.searchsorted(self._first, indices, side="right") - 1
        for number in np.unique(year_of):
            chosen = np.flatnonzero(year_of == number)
            values[chosen] = self._maps[number].array[indices[chosen] - self._first[number], column]
        return values

    def _select(self, names: tuple[str, ...]) -> slice | list[int]:
        """Positions of `names` in `dynamic`: a slice if they are consecutive, so that it selects a view."""
        if names not in self._places:
            places = [self.dynamic.index(name) for name in names]
            in_a_row = bool(places) and places == list(range(places[0], places[0] + len(places)))
            self._places[names] = slice(places[0], places[-1] + 1) if in_a_row else places
        return self._places[names]

    def _hour(self, index: int, places: slice | list[int]) -> np.ndarray:
        """[V, H, W], all that is stored at `index` of `times`, of which the variables at `places` are about to be read.

        IndexError for an index outside `times`.
        """
        if not 0 <= index < len(self.times):
            raise IndexError(f"position {index} of {len(self.times)} times")
        number = bisect.bisect_right(self._first, index) - 1
        year, position = self._maps[number], index - int(self._first[number])
        if places:
            year.expect(position, places)
        return year.array[position]

    def _map(self, number: int) -> "_Map":
        year, manifest = self._manifest.years[number], self._manifest
        shape = (int(np.diff(self._first)[number]), len(self.dynamic), *manifest.shape)
        return _Map(self.folder / year.array.name, year.array.size, year.header, manifest.dtype, shape)


class _Map:
    """The array of one year, mapped. array: read only, [T, V, H, W]."""

    def __init__(self, path: Path, size: int, header: int, dtype: str, shape: tuple[int, ...]):
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        try:
            if os.fstat(descriptor).st_size != size:  # a read past the end of a map would kill the process
                raise DataError(f"{path}: has {os.fstat(descriptor).st_size} bytes: expected {size}")
            self._map = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        self._map.madvise(mmap.MADV_RANDOM)
        self.array = np.frombuffer(self._map, dtype, offset=header).reshape(shape)
        self._header, self._hour_bytes = header, self.array[0].nbytes if len(self.array) else 0

    def expect(self, position: int, places: slice | list[int]) -> None:
        """Tell the operating system to fetch an hour at once, not page by page on access."""
        field = self._hour_bytes // self.array.shape[1]
        first, last = (places.start, places.stop) if isinstance(places, slice) else (min(places), max(places) + 1)
        begin = self._header + position * self._hour_bytes + first * field
        aligned = begin - begin % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, aligned, begin + (last - first) * field - aligned)


def _day_of(times: np.ndarray, piece: np.ndarray) -> str:
    return str(times[piece[0]].astype("datetime64[D]"))


def serial_pieces(values: np.ndarray) -> tuple[torch.Tensor, ...]:
    """Return a contiguous array of any shape as flat views that torch works on with the calling thread alone.

    Otherwise torch would start OpenMP threads for each loader thread, which take the processors of the training step.
    """
    return torch.from_numpy(values).view(-1).split(_SERIAL_ELEMENTS)
