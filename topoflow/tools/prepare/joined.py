"""All sources as one series of fields on the target grid."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr

from topoflow.data.grid import same_place
from topoflow.errors import DataError
from topoflow.tools.prepare.checker import Checker
from topoflow.tools.prepare.files import file_states, read_values
from topoflow.tools.prepare.findings import Findings
from topoflow.tools.prepare.place import Place
from topoflow.tools.prepare.recipe import Recipe
from topoflow.tools.prepare.regridding import FieldRegridding, PointMeans, Target
from topoflow.tools.prepare.scan import Opener, Piece, Scan
from topoflow.tools.prepare.variables import Reader

_BLOCK_BYTES = 64 * 2**20
"""Approximate size of the fields that are read at once, if the files' chunks are smaller."""
_MOST_BYTES = 512 * 2**20


@dataclass(frozen=True)
class _Supply:
    """What one file has of the times that are written: positions in them, increasing, and rows in the file.

    A position may be there several times: their values are averaged (rules.duplicates: mean).
    """

    piece: Piece
    positions: np.ndarray
    rows: np.ndarray


class JoinedSource:
    """The fields of a scan on the cells of `target`, read and checked day by day; see `writing.Fields`.

    Fields are regridded; stations are averaged in cells, over all files. A station is one by its id.
    """

    def __init__(self, recipe: Recipe, found: Scan, target: Target, opener: Opener, findings: Findings):
        self.times, self.step_hours, self.shape = found.times, found.step_hours, target.shape
        self.units: Mapping[str, str] = {name: found.units[name] for name in found.names}
        self._recipe, self._target, self._opener, self._findings = recipe, target, opener, findings
        self._checker = Checker(recipe.rules, findings, self.units)
        changing = [piece for piece in found.pieces if piece.clock is not None and piece.readers]
        supplies = [self._supply(piece) for piece in changing]
        if recipe.rules.duplicates == "last":  # of gridded files: the first in this list counts
            supplies.reverse()
        self._supplies = supplies
        self._stations = _Stations([p for p in changing if p.place.kind == "stations"], target, findings)
        self._regriddings: dict[tuple[bytes, bytes], FieldRegridding] = {}
        largest = max([self.shape[0] * self.shape[1], *(piece.place.lat.size for piece in changing)])
        self._hour_bytes = 8 * largest * max(1, len(self.units))
        self._chunk_hours = max((piece.chunk_hours for piece in changing), default=1)
        self._reading = _reading_of(recipe, target)

    @property
    def is_decided(self) -> bool:
        """Whether everything read so far may be written."""
        return not self._findings.open() and self._checker.is_decided()

    def fields(self, positions: np.ndarray) -> np.ndarray:
        """Return float32 [n, V, H, W] at increasing positions [n] of `times`, without counting what is dropped."""
        return self._read(positions, Checker(self._recipe.rules, Findings(), self.units))

    def days(self, pieces: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, int]]]:
        """Yield (positions, float32 [n, V, H, W], values dropped by reason) of each day; reads several at once."""
        per_day = max((len(piece) for piece in pieces), default=1)
        block = max(_BLOCK_BYTES // self._hour_bytes, min(self._chunk_hours, _MOST_BYTES // self._hour_bytes))
        at_once = min(31, max(1, block // per_day))
        for first in range(0, len(pieces), at_once):
            group = pieces[first : first + at_once]
            together = np.concatenate(group)
            fields = self._read(together, self._checker)
            begin = 0
            for piece in group:
                day = np.datetime64(str(self.times[piece[0]])[:10])
                yield piece, fields[begin : begin + len(piece)], self._checker.dropped(day)
                begin += len(piece)

    def seen(self) -> list[Any]:
        """Return, as plain values, what `finish` is to know of the values that were read since the last call."""
        return self._checker.seen()

    def recall(self, seen: list[Any]) -> None:
        """Take up what `seen` returned in an interrupted process."""
        self._checker.recall(seen)

    def finish(self) -> None:
        """Add the findings about values, now that all have been read."""
        self._checker.report()

    def file_states(self, first: int, stop: int) -> list[str]:
        """Return sizes and times of change of the files that have times [first, stop), and how they are read."""
        having = (s.piece for s in self._supplies if np.any((s.positions >= first) & (s.positions < stop)))
        return [self._reading, *sorted(state for piece in having for state in file_states(piece.path))]

    def _supply(self, piece: Piece) -> _Supply:
        assert piece.clock is not None
        clock = piece.clock
        times = clock.times[clock.index]
        positions = np.searchsorted(self.times, times)
        inside = positions < len(self.times)
        inside[inside] = self.times[positions[inside]] == times[inside]
        return _Supply(piece, positions[inside], clock.order[inside])

    def _read(self, positions: np.ndarray, checker: Checker) -> np.ndarray:
        out = np.empty((len(positions), len(self.units), *self.shape), np.float32)
        for column, name in enumerate(self.units):
            having = [s for s in self._supplies if name in s.piece.readers]
            if having and having[0].piece.place.kind == "stations":
                out[:, column] = self._read_stations(name, having, positions, checker)
                continue
            taken = np.zeros(len(positions), bool)
            for supply in having:
                at, rows = _select(supply, positions, ~taken)
                if len(at):
                    values = self._values(supply.piece, name, rows, self.times[positions[at]], checker)
                    at, values = _mean_of_same(at, values)
                    out[at, column] = self._regridding(supply.piece.place).mean(values)
                    taken[at] = True
            out[~taken, column] = np.nan
        return out

    def _read_stations(
        self, name: str, having: Sequence[_Supply], positions: np.ndarray, checker: Checker
    ) -> np.ndarray:
        """float32 [n, H, W]: cell means over the stations of all files."""
        values = np.full((len(positions), self._stations.count), np.nan)
        everywhere = np.ones(len(positions), bool)
        for supply in having:
            at, rows = _select(supply, positions, everywhere)
            if not len(at):
                continue
            place = supply.piece.place
            at, found = _mean_of_same(at, self._values(supply.piece, name, rows, self.times[positions[at]], checker))
            where = np.ix_(at, self._stations.index(place))
            before = values[where]
            twice = ~np.isnan(before) & ~np.isnan(found) & (before != found)
            if twice.any():
                self._add_twice(supply.piece, name, int(twice.sum()))
            keep_first = self._recipe.rules.duplicates != "last"
            values[where] = np.where(np.isnan(found) | (keep_first & ~np.isnan(before)), before, found)
        return self._stations.points.mean(values)

    def _add_twice(self, piece: Piece, name: str, count: int) -> None:
        found = f"{count} values of stations that another file gives otherwise"
        if self._recipe.rules.duplicates in ("first", "last"):
            self._findings.add("note", piece.path, name, found)
        else:
            settle = "rules: {duplicates: first}"
            self._findings.add("decision", piece.path, name, found, "one value for a station and hour", settle)

    def _values(self, piece: Piece, name: str, rows: np.ndarray, times: np.ndarray, checker: Checker) -> np.ndarray:
        """[n, h, w] or [n, S] in our unit, checked; missing, with a finding, where they cannot be read."""
        dataset = self._opener.open(piece.path, piece.spec)
        shape = (len(rows), *piece.place.lat.shape)
        if dataset is None:
            return np.full(shape, np.nan, np.float32)
        try:
            assert piece.clock is not None
            values = read_field(dataset, piece.place, piece.readers[name], rows, piece.clock.dims)
        except DataError as error:
            self._findings.add("error", piece.path, name, str(error), "values that can be read")
            return np.full(shape, np.nan, np.float32)
        return checker.check(name, values, times, piece.path, piece.readers[name].of_raw)

    def _regridding(self, place: Place) -> FieldRegridding:
        key = place.lat.tobytes(), place.lon.tobytes()
        if key not in self._regriddings:
            method = self._recipe.grid.method
            self._regriddings[key] = FieldRegridding(place.lat, place.lon, self._target.lat, self._target.lon, method)
        return self._regriddings[key]


def _reading_of(recipe: Recipe, target: Target) -> str:
    """Return a hash of all that decides which values come from given files: the recipe but for paths, and the cells."""
    ways = sorted({repr(replace(source, path="")) for source in recipe.sources})
    digest = hashlib.sha256(repr((ways, recipe.variables, recipe.frequency, recipe.grid, recipe.rules)).encode())
    for degrees in (target.lat, target.lon):
        digest.update(np.round(degrees, 6).tobytes())
    return digest.hexdigest()


def _select(supply: _Supply, positions: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places in `positions` of those that are `wanted` and the file has, and its rows: as many, maybe some twice."""
    place = np.searchsorted(positions, supply.positions)
    there = place < len(positions)
    there[there] = (positions[place[there]] == supply.positions[there]) & wanted[place[there]]
    return place[there], supply.rows[there]


def _mean_of_same(at: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each place once, with the mean of its values [n, ...] that are present."""
    places, first, counts = np.unique(at, return_index=True, return_counts=True)
    if len(places) == len(at):
        return at, values
    mean = values[first].astype(np.float64)
    for k in np.flatnonzero(counts > 1):
        same = values[first[k] : first[k] + counts[k]].astype(np.float64)
        present = ~np.isnan(same)
        total = np.where(present, same, 0.0).sum(axis=0)
        mean[k] = np.divide(total, present.sum(axis=0), out=np.full(total.shape, np.nan), where=present.any(axis=0))
    return places, mean


def read_field(
    dataset: xr.Dataset, place: Place, reader: Reader, rows: np.ndarray | None = None, time_dims: Sequence[str] = ()
) -> np.ndarray:
    """Return a variable in our unit, [n, h, w] or [n, S] at `rows` along `time_dims`; [h, w] or [S] without them.

    Raises:
        DataError: a library cannot read it.
    """
    arrays = {need: _read_turned(dataset, place, need, rows, time_dims) for need in reader.needs}
    return reader.convert(arrays)


def _read_turned(
    dataset: xr.Dataset, place: Place, name: str, rows: np.ndarray | None, time_dims: Sequence[str]
) -> np.ndarray:
    """[n, h, w] or [n, S] at `rows`, which count along `time_dims`, the last fastest; further dimensions of size 1."""
    variable = dataset[name]
    if rows is None:
        return _read_unchanging(dataset, place, name)
    levels = {str(dim): 0 for dim in variable.dims if dim not in (*place.dims, *time_dims)}
    if any(variable.sizes[dim] > 1 for dim in levels):
        sizes = ", ".join(f"{dim} {variable.sizes[dim]}" for dim in levels)
        raise DataError(f"has dimensions beside time and place ({sizes}): expected one level")
    here = [dim for dim in time_dims if dim in variable.dims]
    dims = [str(dim) for dim in variable.dims if dim not in levels]
    if not here:
        values = place.turn(read_values(dataset, name, levels), dims)
        return np.broadcast_to(values, (len(rows), *values.shape))
    if len(here) == 1:
        first, last = int(rows.min()), int(rows.max())
        values = read_values(dataset, name, {**levels, here[0]: slice(first, last + 1)})
        turned = place.turn(values, dims)
        return turned if len(rows) == last - first + 1 and np.all(np.diff(rows) == 1) else turned[rows - first]
    index = np.unravel_index(rows, [variable.sizes[dim] for dim in here])
    ranges = [slice(int(i.min()), int(i.max()) + 1) for i in index]
    values = read_values(dataset, name, {**levels, **dict(zip(here, ranges, strict=True))})
    others = [dim for dim in dims if dim not in here]
    values = np.transpose(values, [dims.index(dim) for dim in (*here, *others)])
    turned = place.turn(values, [*here, *others])
    return turned[tuple(i - part.start for i, part in zip(index, ranges, strict=True))]


def _read_unchanging(dataset: xr.Dataset, place: Place, name: str) -> np.ndarray:
    """[h, w] or [S] of a field that does not change, even where the file repeats it at each time."""
    variable = dataset[name]
    others = [str(dim) for dim in variable.dims if dim not in place.dims]
    dims = [dim for dim in variable.dims if dim in place.dims]
    first, last = (read_values(dataset, name, {dim: at * (variable.sizes[dim] - 1) for dim in others}) for at in (0, 1))
    if not np.allclose(first, last, rtol=1e-4, atol=1e-3, equal_nan=True):
        sizes = ", ".join(f"{dim} {variable.sizes[dim]}" for dim in others)
        raise DataError(f"changes along further dimensions ({sizes}): expected one field; cut the file to it")
    return place.turn(first, dims)


class _Stations:
    """All stations of all files, each once by its id. points: their cells."""

    def __init__(self, pieces: Sequence[Piece], target: Target, findings: Findings):
        self._number: dict[str, int] = {}
        lat, lon = [], []
        for piece in pieces:
            elsewhere = []
            for station, *position in zip(piece.place.ids, piece.place.lat, piece.place.lon, strict=True):
                number = self._number.setdefault(station, len(lat))
                if number == len(lat):
                    lat.append(position[0])
                    lon.append(position[1])
                elif not same_place(np.array([lat[number], lon[number]]), np.array(position)):
                    elsewhere.append(station)
            if elsewhere:
                found = f"{len(elsewhere)} stations are elsewhere in other files, the first {elsewhere[0]}"
                findings.add(
                    "error",
                    piece.path,
                    "",
                    found,
                    "one position for each name; rename those that moved, or of another network",
                )
        self.count = len(lat)
        shared = len(lat) - len({(round(a, 4), round((b + 180) % 360, 4)) for a, b in zip(lat, lon, strict=True)})
        if shared:
            found = f"{shared} stations are where another of another name is: each counts in the mean of its cell"
            findings.add("note", "stations", "", found)
        self.points = PointMeans(np.array(lat, float), np.array(lon, float), target.lat, target.lon, target.axes)
        if self.count:
            outside = int((self.points.cell < 0).sum())
            cells = len(np.unique(self.points.cell[self.points.cell >= 0]))
            text = f"{self.count} stations, {self.count - outside} of them in {cells} cells"
            findings.add("note" if outside < self.count else "error", "stations", "", text)

    def index(self, place: Place) -> np.ndarray:
        """Numbers of a file's stations, int64 [S]."""
        return np.array([self._number[station] for station in place.ids])
