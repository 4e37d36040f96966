"""A packed data set as a source of fields: each hour is one stretch of a file that is mapped into memory."""

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from topoflow.data.fields import FieldSource, select, serial_pieces
from topoflow.data.grid import Grid, build_grid
from topoflow.data.moments import Moments, is_whole_day
from topoflow.data.packed.days import DayRecord, read_days
from topoflow.data.packed.manifest import MANIFEST, Manifest, check_sizes, read_manifest
from topoflow.data.variables import VARIABLES
from topoflow.errors import DataError


@dataclass(frozen=True)
class PackedIndex:
    """All of a packed data set but its numbers: a value that another process can be sent.

    grid: with the static fields that were asked for. dynamic: names of the fields that were asked for, in the order in
    which they lie. mask: bool [H, W], the cells that count, if they were packed with one. fingerprint: hex SHA-256 of
    what the data are.
    """

    folder: Path
    manifest: Manifest
    grid: Grid
    dynamic: tuple[str, ...]
    mask: np.ndarray | None
    fingerprint: str


def is_packed(path: Path) -> bool:
    """Whether `path` is the folder of a packed data set."""
    return (path / MANIFEST).is_file()


def index_packed(folder: Path, variables: Sequence[str]) -> PackedIndex:
    """Look at the packed data set in `folder` for the dynamic and static `variables` (computed ones may be named).

    The fingerprint is left empty. Raises DataError, naming the file, for a file that is missing, damaged or of another
    size, and for a variable that is not there.
    """
    manifest = read_manifest(folder)
    check_sizes(manifest, folder)
    if manifest.step_hours != 1:
        raise DataError(
            f"data.path: {folder} has a time every {manifest.step_hours} hours: expected hourly data (prepare it with "
            "hourly sources)"
        )
    held = {variable.name: variable for variable in manifest.variables}
    wanted = [name for name in variables if VARIABLES[name].kind != "computed"]
    for name in wanted:
        if name not in held and name not in manifest.statics:
            has = ", ".join(sorted((*held, *({"elevation", "population"} & manifest.statics.keys()))))
            raise DataError(f"data.path: {folder} has no variable {name!r}: it has {has}")
        if name in held and held[name].unit != VARIABLES[name].unit:
            raise DataError(
                f"data.path: {folder}: variable {name!r} has units {held[name].unit!r}: "
                f"expected {VARIABLES[name].unit!r} (pack the data again)"
            )
    plain = build_grid(*(_read_static(folder, manifest, name) for name in ("lat2d", "lon2d")), where=str(folder))
    statics = {name: _read_static(folder, manifest, name) for name in ("elevation", "population") if name in wanted}
    grid = Grid(
        plain.lat2d,
        plain.lon2d,
        plain.north_first,
        elevation_m=statics.get("elevation"),
        population=statics.get("population"),
    )
    mask = _read_static(folder, manifest, "mask") if "mask" in manifest.statics else None
    return PackedIndex(folder, manifest, grid, tuple(name for name in held if name in wanted), mask, fingerprint="")


def _read_static(folder: Path, manifest: Manifest, name: str) -> np.ndarray:
    path = folder / manifest.statics[name].name
    try:
        field = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}".splitlines()[0]) from error
    if field.shape != manifest.shape:
        raise DataError(f"{path}: has shape {field.shape}: expected {manifest.shape}")
    return field


class PackedSource(FieldSource):
    """The fields of a packed data set. What is read of them lies in the page cache, once for all processes."""

    def __init__(self, index: PackedIndex):
        manifest = index.manifest
        super().__init__(
            np.concatenate([year.times for year in manifest.years]), index.grid, index.dynamic, index.fingerprint
        )
        self._folder, self._manifest = index.folder, manifest
        self._held = tuple(variable.name for variable in manifest.variables)
        scales = [(variable.scale, variable.offset) for variable in manifest.variables]
        self._scale, self._offset = np.array(scales, np.float32).reshape(-1, 2).T[..., None, None]
        self._is_scaled = manifest.dtype != "<f4"
        self._first = np.cumsum([0] + [sum(count for _, count in year.runs) for year in manifest.years])
        self._maps: dict[int, _Map] = {}
        self._places: dict[tuple[str, ...], slice | list[int]] = {}
        self._days: dict[int, dict[str, DayRecord]] = {}

    @property
    def where(self) -> str:
        return "in memory" if self.in_memory else f"packed as {np.dtype(self._manifest.dtype)}, mapped into memory"

    def close(self) -> None:
        self._maps = {}  # a map ends with the last array that looks into it

    def moments_of_day(self, name: str, piece: np.ndarray) -> Moments | None:
        if not is_whole_day(self.times, piece):
            return None
        number = self._year_of(int(piece[0]))
        days = self._days.get(number)
        if days is None:
            file = self._manifest.years[number].days
            days = {day.day: day for day in read_days(self._folder / file.name, file.sha256)}
            self._days = {number: days}
        return days[str(self.times[piece[0]].astype("datetime64[D]"))].moments[name]

    def file_states(self, first: int, stop: int) -> list[str]:
        inside = zip(self._manifest.years, self._first[:-1], self._first[1:], strict=True)
        return [year.days.sha256 for year, begin, end in inside if begin < stop and end > first]

    def _read(self, name: str, indices: np.ndarray) -> np.ndarray:
        values = np.empty((len(indices), *self.grid.shape), np.float32)
        column, year_of = self._held.index(name), np.searchsorted(self._first, indices, side="right") - 1
        for number in np.unique(year_of):
            chosen = np.flatnonzero(year_of == number)
            values[chosen] = self._map(int(number)).array[indices[chosen] - self._first[number], column]
        if self._is_scaled:
            values *= self._scale[column]
            values += self._offset[column]
        return values

    def _read_hour(self, names: tuple[str, ...], index: int) -> np.ndarray:
        number = self._year_of(index)
        places, year = select(names, self._held, self._places), self._map(number)
        position = index - int(self._first[number])
        if names:
            year.expect(position, places)
        fields = year.array[position, places]
        if not self._is_scaled:
            return fields
        # torch converts float16 several times as fast as numpy; the copy is because it needs a writable array
        values = np.empty(fields.shape, np.float32)
        for piece, halves in zip(serial_pieces(values), serial_pieces(fields.copy()), strict=True):
            piece.copy_(halves)
        values *= self._scale[places]
        values += self._offset[places]
        return values

    def _year_of(self, index: int) -> int:
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def _map(self, number: int) -> "_Map":
        maps = self._maps  # another thread may close it; two that map the same year at a time do no harm
        found = maps.get(number)
        if found is None:
            year, manifest = self._manifest.years[number], self._manifest
            shape = (int(np.diff(self._first)[number]), len(self._held), *manifest.shape)
            path = self._folder / year.array.name
            found = maps[number] = _Map(path, year.array.size, year.header, manifest.dtype, shape)
        return found


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
