"""The grid that is written, and the fields that do not change on it."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from topoflow.data.prepared.manifest import is_prepared, read_manifest
from topoflow.data.prepared.reader import read_static
from topoflow.errors import ConfigError, DataError
from topoflow.tools.prepare.cells import build_cells
from topoflow.tools.prepare.checker import Checker
from topoflow.tools.prepare.findings import Findings
from topoflow.tools.prepare.joined import read_field
from topoflow.tools.prepare.names import KNOWN
from topoflow.tools.prepare.place import Place, read_place
from topoflow.tools.prepare.recipe import GridSpec, Recipe, Source
from topoflow.tools.prepare.regridding import Axes, FieldRegridding, Target, axes_of
from topoflow.tools.prepare.scan import Opener, Piece
from topoflow.tools.prepare.variables import Reader, describe

DEFAULT_DEGREES = 1.0
"""Side of a cell where only stations are given and the recipe says nothing."""


def build_target(spec: GridSpec, pieces: Sequence[Piece], opener: Opener, findings: Findings) -> Target | None:
    """Return the grid of the recipe, or None with a finding.

    native: the cells of the first gridded source, or cells of one degree around stations.
    """
    target = _build(spec, pieces, opener, findings)
    if target is not None and min(target.shape) < 2:
        found = f"a grid of {target.shape[0]} x {target.shape[1]} cells"
        line = "grid: {degrees: 0.1} (smaller cells), or a box"
        findings.add("decision", "recipe", "", found, "at least 2 x 2", line)
        return None
    return target


def _build(spec: GridSpec, pieces: Sequence[Piece], opener: Opener, findings: Findings) -> Target | None:
    fields = [piece.place for piece in pieces if piece.place.kind == "grid" and piece.readers]
    if sum((spec.like is not None, spec.degrees is not None, spec.shape is not None)) > 1:
        findings.add("error", "recipe", "", "grid: more than one of like, degrees, shape", "one of them")
        return None
    try:
        if spec.like is not None:
            return _like(spec.like, opener, findings)
        if spec.shape is not None:
            if not fields:
                findings.add("error", "recipe", "", f"grid: shape: {list(spec.shape)}", "a gridded source, or degrees")
                return None
            return _coarser(fields[0], spec.shape)
        if spec.degrees is None and fields:
            return Target(fields[0].lat, fields[0].lon, axes_of(fields[0].lat, fields[0].lon))
        lat = np.concatenate([piece.place.lat.ravel() for piece in pieces])
        lon = np.concatenate([piece.place.lon.ravel() for piece in pieces])
        there = np.isfinite(lat) & np.isfinite(lon)
        cells = build_cells(lat[there], lon[there], spec.degrees or DEFAULT_DEGREES, spec.box)
    except ConfigError as error:
        findings.add("error", "recipe", "", f"grid: {error}")
        return None
    lat2d, lon2d = np.meshgrid(cells.lat[::-1], cells.lon, indexing="ij")
    rows, columns = cells.shape
    lat_edges = cells.south + np.arange(rows, -1, -1) * cells.degrees
    lon_edges = cells.west + np.arange(columns + 1) * cells.degrees
    return Target(lat2d, lon2d, Axes(cells.lat[::-1], cells.lon, lat_edges, lon_edges))


def _like(path: str, opener: Opener, findings: Findings) -> Target | None:
    if is_prepared(Path(path)):
        fields = read_static(Path(path), read_manifest(Path(path)))
        return Target(fields["lat2d"], fields["lon2d"], axes_of(fields["lat2d"], fields["lon2d"]))
    spec = Source(path=path)
    dataset = opener.open(Path(path), spec)
    place = None if dataset is None else read_grid(dataset, spec, opener, findings)
    return None if place is None else Target(place.lat, place.lon, axes_of(place.lat, place.lon))


def read_grid(dataset, spec: Source, opener: Opener, findings: Findings) -> Place | None:
    """Return the place of a file that must be gridded."""
    place = read_place(dataset, spec, findings, str(spec.path), opener.rules.positions)
    if place is not None and place.kind != "grid":
        findings.add("error", spec.path, "", "stations", "fields on a grid")
        return None
    return place


def _coarser(place: Place, shape: tuple[int, int]) -> Target:
    """`shape` rows and columns over the extent of `place`."""
    axes = axes_of(place.lat, place.lon)
    if axes is None:
        raise ConfigError("shape: the source's rows or columns are not straight: expected degrees and box")
    if min(shape) < 2:
        raise ConfigError(f"shape: {list(shape)}: expected at least [2, 2]")
    lat_edges, lon_edges = (
        np.interp(np.linspace(0, len(edges) - 1, n + 1), np.arange(len(edges)), edges)
        for edges, n in ((axes.lat_edges, shape[0]), (axes.lon_edges, shape[1]))
    )
    lat, lon = (lat_edges[1:] + lat_edges[:-1]) / 2, (lon_edges[1:] + lon_edges[:-1]) / 2
    lat2d, lon2d = np.meshgrid(lat, lon, indexing="ij")
    return Target(lat2d, lon2d, Axes(lat, lon, lat_edges, lon_edges))


class Statics:
    """The fields that do not change, on the target: terrain height, population, mask, positions of the cells."""

    def __init__(self, recipe: Recipe, target: Target, pieces: Sequence[Piece], opener: Opener, findings: Findings):
        self._recipe, self._target, self._pieces = recipe, target, pieces
        self._opener, self._findings = opener, findings

    def build(self) -> dict[str, np.ndarray]:
        """Return {name: [H, W]}: lat2d and lon2d float64, mask bool, others float32."""
        fields = {"lat2d": self._target.lat, "lon2d": self._target.lon}
        for name in ("elevation", "population"):
            field = self._field(name)
            if field is not None:
                fields[name] = field
        mask = self._mask()
        return fields if mask is None else {**fields, "mask": mask}

    def _field(self, name: str) -> np.ndarray | None:
        path = getattr(self._recipe, name)
        if path is not None:
            spec = Source(path=path, names=self._names_of(name), units=self._units_of(name))
            found = self._read(Path(path), spec, name)
            if found is None and not self._findings.open():
                self._findings.add("error", path, name, f"no field {name}", f"{name} on latitudes and longitudes")
        else:
            having = [piece for piece in self._pieces if name in piece.statics and piece.place.kind == "grid"]
            found = self._read(having[0].path, having[0].spec, name) if having else None
        if found is None:
            return None
        return self._elevation(found, path or name) if name == "elevation" else found

    def _names_of(self, name: str) -> dict[str, str]:
        return next(({name: s.names[name]} for s in self._recipe.sources if name in s.names), {})

    def _units_of(self, name: str) -> dict[str, str]:
        return next(({name: s.units[name]} for s in self._recipe.sources if name in s.units), {})

    def _read(self, path: Path, spec: Source, name: str) -> np.ndarray | None:
        """The field of a file on the target's cells."""
        dataset = self._opener.open(path, spec)
        place = None if dataset is None else read_grid(dataset, spec, self._opener, self._findings)
        if dataset is None or place is None:
            return None
        reader = describe(dataset, spec, self._findings, str(path)).get(name)
        if reader is None:
            return None
        try:
            values = read_field(dataset, place, reader)
        except DataError as error:
            self._findings.add("error", path, name, str(error), "values that can be read")
            return None
        values = self._check(name, values, path, reader)
        method = "area" if name == "population" else self._recipe.grid.method
        regridding = FieldRegridding(place.lat, place.lon, self._target.lat, self._target.lon, method)
        return regridding.share_out(values) if name == "population" else regridding.mean(values)

    def _check(self, name: str, values: np.ndarray, path: Path, reader: Reader) -> np.ndarray:
        """Return the values [h, w] without those that the recipe drops; findings on those that cannot be."""
        drop, keep = (
            tuple(rule for rule in rules if rule.lstrip().startswith((name, "any")))
            for rules in (self._recipe.rules.drop, self._recipe.rules.keep)
        )
        checker = Checker(replace(self._recipe.rules, drop=drop, keep=keep), self._findings, {name: reader.unit})
        checked = checker.check(name, values[None], np.zeros(1, "M8[D]"), path, reader.of_raw)[0]
        for reason, count in checker.dropped(np.datetime64(0, "D")).items():
            self._findings.add("note", path, name, f"dropped {reason.split(': ')[1]}: {count} cells")
        if name == "elevation" and np.nanmin(checked, initial=0.0) < KNOWN[name].low:
            found = f"heights down to {np.nanmin(checked):g} m: the depth of the sea, or a mark of missing values?"
            line = 'rules: {drop: ["elevation < 0"]} (then 0 m, as over the sea)'
            self._findings.add("decision", path, name, found, f"heights above {KNOWN[name].low:g} m", line)
        else:
            checker.report()
        return checked

    def _elevation(self, field: np.ndarray, path: str) -> np.ndarray:
        """Without a missing value: 0 m where the terrain has none, as over the sea."""
        empty = np.isnan(field)
        if not empty.any():
            return field
        found = f"{empty.sum()} of {field.size} cells have no height"
        if self._recipe.rules.sea == "refuse":
            self._findings.add("decision", path, "elevation", found, "a height in each cell", "rules: {sea: zero}")
        else:
            self._findings.add("note", path, "elevation", f"{found}: 0 m, as over the sea")
        return np.where(empty, np.float32(0), field)

    def _mask(self) -> np.ndarray | None:
        path = self._recipe.mask
        if path is None:
            return None
        counts = self._array_mask(Path(path)) if path.endswith(".npy") else self._file_mask(Path(path))
        if counts is None:
            return None
        if not counts.any():
            self._findings.add("error", path, "mask", "no cell counts", "at least one cell that is not 0")
        return counts

    def _array_mask(self, path: Path) -> np.ndarray | None:
        try:
            values = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            self._findings.add("error", path, "mask", f"cannot be read: {error}".splitlines()[0])
            return None
        if values.shape != self._target.shape or values.dtype.kind not in "biuf" or not np.isfinite(values).all():
            found = f"shape {values.shape}, type {values.dtype}"
            expected = f"0 or 1 in each of {self._target.shape[0]} x {self._target.shape[1]} cells, north first"
            self._findings.add("error", path, "mask", found, expected)
            return None
        return values != 0

    def _file_mask(self, path: Path) -> np.ndarray | None:
        spec = Source(path=str(path))
        dataset = self._opener.open(path, spec)
        place = None if dataset is None else read_grid(dataset, spec, self._opener, self._findings)
        if dataset is None or place is None:
            return None
        dataset = dataset.squeeze([dim for dim in dataset.dims if dataset.sizes[dim] == 1 and dim not in place.dims])
        flat = [name for name in dataset.data_vars if set(dataset[name].dims) == set(place.dims)]
        named = [name for name in flat if re.search("mask|land|lsm", str(name), re.IGNORECASE)] or flat
        if len(named) != 1:
            self._findings.add("error", path, "mask", f"{len(named)} fields that could be the mask", "one field `mask`")
            return None
        values = place.turn(dataset[named[0]].values.astype(np.float64), dataset[named[0]].dims)
        if not np.isfinite(values).all():
            self._findings.add("error", path, "mask", "values that are missing", "0 or 1 in each cell")
            return None
        if values.min() < 0 or values.max() > 1:
            found = f"values from {values.min():g} to {values.max():g}"
            self._findings.add("error", path, str(named[0]), found, "0 or 1 in each cell, or a fraction between them")
            return None
        if not np.isin(values, (0, 1)).all():
            self._findings.add("note", path, str(named[0]), "fractions: cells of at least 0.5 count")
        regridding = FieldRegridding(place.lat, place.lon, self._target.lat, self._target.lon, "area")
        return np.nan_to_num(regridding.mean(values)) >= 0.5
