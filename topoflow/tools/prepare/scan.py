"""Look at all files of a recipe: what they hold, where, when, and on which grid it is to be written."""

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xarray as xr

from topoflow.data.variables import VARIABLES
from topoflow.tools.prepare.clock import Clock, read_times
from topoflow.tools.prepare.coordinates import USUAL_NAMES as COORDINATES
from topoflow.tools.prepare.files import find_files, open_file
from topoflow.tools.prepare.findings import Findings
from topoflow.tools.prepare.place import Place, read_place
from topoflow.tools.prepare.recipe import Recipe, Source
from topoflow.tools.prepare.tables import read_table, without_columns
from topoflow.tools.prepare.variables import Reader, describe

_OPEN_FILES = 40
_FEW_UNREAD = 8
_TILT_DEGREES = 1.0
_HOUR = np.timedelta64(1, "h")
_LONGEST_STEP = 6
_TABLE = re.compile(r"\.(csv|tsv|txt|parquet|pq)(\.(gz|zip|bz2|xz))?$", re.IGNORECASE)
_DURATION = re.compile(r"(\d+)\s*(h|d)")


@dataclass(frozen=True)
class Piece:
    """One file. source: its number in the recipe. clock: None where nothing in it changes in time.

    readers: {our name: reader} of what changes in time, statics of what does not. chunk_hours: times that are stored
    together, and so read together.
    """

    source: int
    spec: Source
    path: Path
    place: Place
    clock: Clock | None
    readers: Mapping[str, Reader]
    statics: Mapping[str, Reader]
    chunk_hours: int


class Opener:
    """The datasets of pieces; the last ones stay open."""

    def __init__(self, recipe: Recipe, findings: Findings):
        self.rules, self._findings = recipe.rules, findings
        self._open: OrderedDict[tuple[Path, str], xr.Dataset] = OrderedDict()

    def open(self, path: Path, spec: Source) -> xr.Dataset | None:
        """Return the dataset of a file; None, with a finding, where it cannot be read."""
        key = path, repr(spec)  # a table is read as its source says
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        if _TABLE.search(path.name):
            dataset = read_table(path, spec, self._findings, self.rules.duplicates)
        else:
            dataset = _at_levels(open_file(path, self.rules, self._findings), path, spec, self._findings)
        if dataset is not None:
            self._open[key] = dataset
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        return dataset

    def close(self) -> None:
        """Close all files."""
        while self._open:
            self._open.popitem()[1].close()


def _at_levels(dataset: xr.Dataset | None, path: Path, spec: Source, findings: Findings) -> xr.Dataset | None:
    """Return a dataset, unread, at the levels that the recipe names; None after a finding."""
    if dataset is None or not spec.levels:
        return dataset
    at = {dim: position for dim, position in spec.levels.items() if dim in dataset.sizes}
    for dim, position in at.items():
        if not position.isdecimal() or int(position) >= dataset.sizes[dim]:
            found = f"levels: {{{dim}: {position}}}"
            findings.add("error", path, "", found, f"a position from 0 to {dataset.sizes[dim] - 1}")
            return None
    chosen = dataset.isel({dim: int(position) for dim, position in at.items()})
    chosen.encoding["source"] = dataset.encoding["source"]
    chosen.set_close(dataset.close)
    return chosen


@dataclass
class Scan:
    """What was found. times: datetime64[h] [T], regular, of what will be written."""

    pieces: list[Piece]
    step_hours: int
    times: np.ndarray
    names: tuple[str, ...]
    units: dict[str, str] = field(default_factory=dict)
    missing_hours: int = 0


def scan(recipe: Recipe, opener: Opener, findings: Findings, step: int | None = None) -> Scan | None:
    """Look at every file of `recipe`; None where nothing can be written, for which `findings` has the reason.

    step: of forecasts, what is so many hours after the issue; times are then those of issue.
    """
    pieces = []
    for number, spec in enumerate(recipe.sources):
        for path in find_files(spec.path, findings):
            piece = _look(number, spec, path, opener, findings, step)
            if piece is not None:
                pieces.append(piece)
    changing = [piece for piece in pieces if piece.clock is not None and piece.readers]
    if not changing:
        if not findings.open():
            found = "no variable that changes in time" if step is None else f"nothing {step} h after an issue (steps)"
            findings.add("error", _files(recipe), "", found, "pollutants or weather")
        return None
    if step is None:
        step_hours = _step(recipe, changing, findings)
        times, missing = _times(recipe, changing, step_hours, findings)
    else:
        times, missing = np.unique(np.concatenate([piece.clock.times for piece in changing if piece.clock])), 0
        step_hours = int(np.gcd.reduce([24, *np.diff(times).astype(int)]))
    names = _names(recipe, changing, findings)
    units = {name: next(p.readers[name].unit for p in changing if name in p.readers) for name in names}
    return Scan(pieces, step_hours, times, names, units, missing)


def _files(recipe: Recipe) -> str:
    return ", ".join(str(source.path) for source in recipe.sources)


def _look(number: int, spec: Source, path: Path, opener: Opener, findings: Findings, step: int | None) -> Piece | None:
    given, dataset = spec, opener.open(path, spec)
    if dataset is None:
        return None
    if _TABLE.search(path.name):
        spec = without_columns(spec)
    place = read_place(dataset, spec, findings, str(path), opener.rules.positions)
    readers = describe(dataset, spec, findings, str(path))
    if place is None:
        return None
    _report_unread(dataset, place, readers, findings, spec)
    _require_eastward_wind(readers, place, spec, findings)
    if not readers:
        return None
    changing, statics, chunk = {}, {}, 1
    for name, reader in readers.items():
        if name in VARIABLES and VARIABLES[name].kind != "dynamic":
            statics[name] = reader
            continue
        changing[name] = reader
        leading = [dim for need in reader.needs for dim in dataset[need].dims if dim not in place.dims]
        for need in reader.needs if leading else ():
            sizes = dataset[need].encoding.get("preferred_chunks") or {}
            chunk = max(chunk, int(sizes.get(leading[0], 1)))
    clock = read_times(dataset, spec, findings, str(path), opener.rules.duplicates, step) if changing else None
    if changing and clock is None:
        return None
    if clock is not None and set(clock.dims) & set(place.dims):
        found = (
            f"times and places share the dimension {', '.join(set(clock.dims) & set(place.dims))}: records one by one"
        )
        expected = "a table (CSV) with one row for each of them, or an array of time and station"
        findings.add("error", path, "", found, expected)
        return None
    if clock is not None:
        changing = _on_one_level(changing, clock, place, dataset, findings, path)
    if clock is not None and len(clock.times) > 1:
        changing = _with_time(changing, clock, dataset, findings, path)
    return Piece(number, given, path, place, clock, changing, statics, chunk)


def _report_unread(
    dataset: xr.Dataset, place: Place, readers: Mapping[str, Reader], findings: Findings, spec: Source
) -> None:
    """Add a note that names the fields that nothing was made of."""
    used = {need for reader in readers.values() for need in reader.needs}
    fields = [name for name in dataset.data_vars if place.dims and set(place.dims) <= set(dataset[name].dims)]
    unread = [str(name) for name in fields if name not in used and not _is_coordinate(dataset[name])]
    if unread and (not used or len(unread) <= _FEW_UNREAD):
        more = ", ..." if len(unread) > _FEW_UNREAD else ""
        found = f"not read, as the names are not known: {', '.join(unread[:_FEW_UNREAD])}{more}"
        # one note for all files of a source that have the same
        files = spec.path if isinstance(spec.path, str) else ", ".join(spec.path)
        findings.add("note", files, "", found, settle=f"names: {{pm25: {unread[0]}}}, if it is that")


def _is_coordinate(array: xr.DataArray) -> bool:
    units = str(array.attrs.get("units", "")).lower()
    is_usual = any(str(array.name).lower() in names for names in COORDINATES.values())
    return is_usual or units.startswith(("degree_", "degrees_")) or array.dtype.kind not in "iuf"


def _require_eastward_wind(readers: Mapping[str, Reader], place: Place, spec: Source, findings: Findings) -> None:
    """Add a decision where WRF's wind along its rows would be taken as eastward, and the rows are not parallels."""
    if place.kind != "grid" or "u" in spec.names or readers.get("u") is None or readers["u"].needs != ("U10",):
        return
    eastward = np.diff(place.lon, axis=1) * np.cos(np.deg2rad(place.lat[:, 1:]))
    tilt = np.rad2deg(np.abs(np.arctan2(np.diff(place.lat, axis=1), eastward))).max()
    if tilt > _TILT_DEGREES:
        files = spec.path if isinstance(spec.path, str) else ", ".join(spec.path)
        found = f"U10 and V10 are along rows that are tilted by up to {tilt:.0f} degrees"
        line = "names: {u: U10, v: V10}, if they are eastward and northward"
        findings.add("decision", files, "U10, V10", found, "COSALPHA and SINALPHA in the file", line)


def _on_one_level(
    readers: Mapping[str, Reader], clock: Clock, place: Place, dataset: xr.Dataset, findings: Findings, path: Path
) -> dict[str, Reader]:
    """Return the readers of what has no dimension beside time and place; a decision for each of the others."""
    kept = {}
    for name, reader in readers.items():
        dims = {str(dim): size for need in reader.needs for dim, size in dataset[need].sizes.items()}
        others = {dim: n for dim, n in dims.items() if n > 1 and dim not in (*place.dims, *clock.dims)}
        if not others:
            kept[name] = reader
            continue
        found = f"has dimensions beside time and place ({', '.join(f'{dim} {n}' for dim, n in others.items())})"
        if "expver" in others:  # ERA5 and its first release, each NaN where the other has values
            findings.add("error", path, ", ".join(reader.needs), found, "both combined: a.combine_first(b) of xarray")
            continue
        line = f"levels: {{{', '.join(f'{dim}: 0' for dim in others)}}}, or another position from 0"
        findings.add("decision", path, ", ".join(reader.needs), found, "one level", line)
    return kept


def _with_time(
    readers: Mapping[str, Reader], clock: Clock, dataset: xr.Dataset, findings: Findings, path: Path
) -> dict[str, Reader]:
    """Return the readers of what has a value for each time; a finding for each of the others."""
    kept = {}
    for name, reader in readers.items():
        if any(set(clock.dims) & set(dataset[need].dims) for need in reader.needs):
            kept[name] = reader
        else:
            found = f"does not change along the times ({', '.join(clock.dims)}): left out"
            findings.add("note", path, ", ".join(reader.needs), found)
    return kept


def _step(recipe: Recipe, pieces: list[Piece], findings: Findings) -> int:
    steps = {piece.clock.step_hours for piece in pieces if piece.clock is not None and piece.clock.step_hours}
    coarsest = max(steps, default=1)
    if recipe.frequency is None:
        if coarsest > _LONGEST_STEP:
            found = f"times every {coarsest} h"
            findings.add("error", _files(recipe), "", found, "times every 1 h, 3 h or 6 h")
        elif len(steps) > 1:
            found = f"times every {', '.join(f'{step} h' for step in sorted(steps))}"
            findings.add("note", _files(recipe), "", f"{found}: every {coarsest} h is written")
        return coarsest
    match = _DURATION.fullmatch(recipe.frequency)
    step = int(match[1]) if match is not None and match[2] == "h" else 0
    if step not in (1, 3, 6):
        findings.add("error", "recipe", "", f"frequency: {recipe.frequency}", "1h, 3h or 6h", "frequency: 1h")
        return coarsest
    if step < coarsest:
        findings.add(
            "error", _files(recipe), "", f"times every {coarsest} h, frequency: {step}h", "a frequency that all have",
            f"frequency: {coarsest}h",
        )  # fmt: skip
        return coarsest
    return step


def _times(recipe: Recipe, pieces: list[Piece], step: int, findings: Findings) -> tuple[np.ndarray, int]:
    present = np.unique(np.concatenate([piece.clock.times for piece in pieces if piece.clock is not None]))
    on_grid = present.astype(np.int64) % step == 0
    if not on_grid.all() and not on_grid.any():
        on_grid = present.astype(np.int64) % step == present[0].astype(np.int64) % step
    if not on_grid.all():
        findings.add(
            "note", _files(recipe), "", f"{(~on_grid).sum()} times between the {step}-hourly ones are left out"
        )
    kept = present[on_grid]
    times = np.arange(kept[0], kept[-1] + _HOUR, step * _HOUR)
    gaps = np.diff(kept) // _HOUR
    limit = _hours(recipe.rules.longest_gap, findings)
    missing = len(times) - len(kept)
    if len(gaps) and gaps.max() > limit + step:
        at = int(gaps.argmax())
        days = -(-int(gaps.max()) // 24)
        findings.add(
            "decision", _files(recipe), "", f"no data from {kept[at]} to {kept[at + 1]}",
            f"gaps of at most {recipe.rules.longest_gap}", f"rules: {{longest_gap: {days}d}}",
        )  # fmt: skip
    elif missing:
        longest = int(gaps.max()) - step
        text = f"{missing} times without data, the longest gap {longest + step} h, are written as missing values"
        findings.add("note", _files(recipe), "", text)
    return times, missing


def _hours(text: str, findings: Findings) -> int:
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        findings.add("error", "recipe", "", f"rules.longest_gap: {text}", "hours or days", "rules: {longest_gap: 48h}")
        return 0
    return int(match[1]) * (24 if match[2] == "d" else 1)


def _names(recipe: Recipe, pieces: list[Piece], findings: Findings) -> tuple[str, ...]:
    """Variables to write, in order; a finding where one comes from fields and from stations, or twice at one hour."""
    held = {name for piece in pieces for name in piece.readers}
    names = recipe.variables or (*(n for n in VARIABLES if n in held), *sorted(held - VARIABLES.keys()))
    for name in names:
        having = [piece for piece in pieces if name in piece.readers]
        if not having:
            known = ", ".join(sorted(held))
            findings.add("error", "recipe", name, "no file has this variable", f"one of {known}")
            continue
        kinds = {piece.place.kind for piece in having}
        if len(kinds) > 1:
            found = f"fields in {_first(having, 'grid')} and stations in {_first(having, 'stations')}"
            findings.add("decision", having[0].path, name, found, "one of them", f"names: {{{name}: ...}}")
        units = {piece.readers[name].unit for piece in having}
        if len(units) > 1:
            found = f"units {' and '.join(sorted(units))}"
            findings.add("decision", having[0].path, name, found, "one unit", f"units: {{{name}: {min(units)}}}")
        if kinds == {"grid"}:
            _require_once(name, having, recipe, findings)
    return tuple(name for name in names if name in held)


def _first(pieces: list[Piece], kind: str) -> Path:
    return next(piece.path for piece in pieces if piece.place.kind == kind)


def _require_once(name: str, pieces: list[Piece], recipe: Recipe, findings: Findings) -> None:
    """A finding where two gridded files have a variable at the same hour."""
    times = np.concatenate([piece.clock.times for piece in pieces if piece.clock is not None])
    owner = np.concatenate([np.full(len(p.clock.times), i) for i, p in enumerate(pieces) if p.clock is not None])
    order = np.argsort(times, kind="stable")
    twice = np.flatnonzero(times[order][1:] == times[order][:-1])
    if not len(twice):
        return
    a, b = (pieces[int(owner[order[twice[0] + k]])] for k in (0, 1))
    found = f"{len(twice)} times that {b.path} has too, the first {times[order][twice[0]]}"
    if recipe.rules.duplicates in ("first", "last"):
        findings.add("note", a.path, name, f"{found}: the {recipe.rules.duplicates} file counts")
        return
    findings.add("decision", a.path, name, found, "each time once", "rules: {duplicates: first}")
