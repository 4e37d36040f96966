"""Tables of stations (CSV, Parquet) as data sets, whatever their layout."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr

from topoflow.errors import DataError
from topoflow.tools.prepare.findings import Findings
from topoflow.tools.prepare.recipe import Source
from topoflow.tools.prepare.station_list import Positions, merge_positions, read_station_list
from topoflow.tools.prepare.table_columns import Layout, find_layout, key_of
from topoflow.tools.prepare.table_files import ROWS, read_columns, read_parts
from topoflow.tools.prepare.table_values import MISSING, Numbers, Stamps

Duplicates = Literal["refuse", "first", "last", "mean"]

COLUMN_ROLES = ("time", "lat", "lon", "station", "parameter", "value")
"""Keys of a recipe's `names` that name columns."""

_UNIT_IN_NAME = re.compile(r".*\S\s*[\[(]([^\])]+)[\])]$")


def without_columns(source: Source) -> Source:
    """Return a source for what `read_table` returned, where time, lat, lon and station have these names."""
    names = {ours: name for ours, name in source.names.items() if ours not in COLUMN_ROLES}
    return dataclasses.replace(source, names=names)


def read_table(
    path: Path,
    source: Source,
    findings: Findings,
    duplicates: Duplicates = "refuse",
    positions: Mapping[str, tuple[float, float]] | None = None,
    rows: int = ROWS,
) -> xr.Dataset | None:
    """Return a table of stations as a data set, or None after a finding that says why it is unreadable.

    Layouts, recognized by the names of columns: long, one value a row (OpenAQ, AQS, EEA); wide, one column a station
    (CNEMC, with a `type` column; RAMA, with the variable in the file's name and the ids in the list of stations); one
    column a variable (UCI Beijing). Stamps are not moved: they are the start or end of an hour, as in the file.

    Args:
        path: CSV (plain, .gz, .zip) or Parquet.
        source: its `names` (columns: see COLUMN_ROLES), `stamp` (which of the start and end of an hour is taken, where
            a table has both) and `stations` count.
        findings: receives what is wrong.
        duplicates: which of several values of one station, time and variable counts. refuse: add a decision, and go on
            with the first.
        positions: the list of stations, where the caller has read it; by default it is read if source.stations is set.
        rows: how many rows are read at a time.

    Returns:
        time: datetime64[ns] [T], increasing, each once; `time_zone` is UTC where the table says so.
        station: ids [S] as text, sorted; lat, lon: float64 [S], degrees, NaN where unknown.
        variables: float64 [T, S], named by parameter or column, with `units` where the table states them. A parameter
            in several units becomes a variable `name [unit]` for each.
    """
    if positions is None and source.stations is not None:
        positions = read_station_list(Path(source.stations), findings)
        if positions is None:
            return None
    try:
        layout = find_layout(read_columns(path), source.names, source.stamp, positions or ())
        table = _Table(layout, path, source, findings)
        for part in read_parts(path, layout.columns(), rows):
            table.add(part.reset_index(drop=True))
        return table.build(duplicates, positions)
    except DataError as error:
        findings.add("error", path, "", str(error), "a table of stations")
        return None


class _Table:
    """Collects the values of a table by variable, part by part."""

    def __init__(self, layout: Layout, path: Path, source: Source, findings: Findings):
        self.layout, self.path, self.source, self.findings = layout, path, source, findings
        self.stem = path.name.split(".")[0]
        self.numbers = Numbers()
        is_day_first = None if source.dates is None else source.dates == "day first"
        if source.dates is None and key_of(layout.time[0]) == "fecha":
            is_day_first = True
        self.stamps, self.other_stamps = Stamps(is_day_first), Stamps(is_day_first)
        self.longer = 0
        self.times = np.empty(0, "M8[ns]")
        self.codes: dict[str, int] = {}
        self.positions: Positions = {}
        self.values: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
        self.invalid = 0

    def add(self, part: Any) -> None:
        """Add rows [n] of the table, a DataFrame."""
        times = self.stamps.read(part[list(self.layout.time)])
        if self.layout.other_end is not None:  # the EEA's files have means over days beside those over hours
            lengths = np.abs(times - self.other_stamps.read(part[[self.layout.other_end]]))
            is_hourly = lengths <= np.timedelta64(61, "m")
            self.longer += int((~is_hourly).sum())
            part, times = part[is_hourly].reset_index(drop=True), times[is_hourly]
        self.times = np.union1d(self.times, times)
        if self.layout.kind == "wide":
            self._add_wide(part, times)
            return
        ids = self._station_ids(part)
        stations = self._encode(ids)
        self._add_positions(part, ids)
        is_valid = self._find_valid(part)
        if self.layout.kind == "columns":
            for name in self.layout.data:
                unit = _UNIT_IN_NAME.match(name)
                values = np.where(is_valid, self.numbers.read(part[name], name), np.nan)
                self._append((name, unit[1] if unit else ""), times, stations, values)
            return
        names = part[self.layout.parameter].astype(str).str.strip()
        units = part[self.layout.unit].astype(str).str.strip() if self.layout.unit else names.str[:0]
        units = units.where(~units.str.lower().isin(MISSING), "")
        values = np.where(is_valid, self.numbers.read(part[self.layout.value], names.to_numpy(object)), np.nan)
        for (name, unit), rows in part.groupby([names, units], sort=False).indices.items():
            self._append((str(name), str(unit)), times[rows], stations[rows], values[rows])

    def _add_wide(self, part: Any, times: np.ndarray) -> None:
        columns = list(self.layout.data)
        stations = self._encode(pd.Series(columns, dtype=str))
        name = re.sub(r"^\d{4}_?", "", self.stem)  # RAMA: 2019PM25.csv
        names = part[self.layout.parameter].astype(str).str.strip() if self.layout.parameter else [name] * len(part)
        names = np.asarray(names, object)
        fields = pd.Series(part[columns].to_numpy().ravel())
        values = self.numbers.read(fields, np.repeat(names, len(columns))).reshape(len(part), -1)
        for name in dict.fromkeys(names):
            rows = names == name
            every = np.broadcast_to(times[rows, None], values[rows].shape).ravel()
            self._append((name, ""), every, np.tile(stations, rows.sum()), values[rows].ravel())

    def _append(self, key: tuple[str, str], times: np.ndarray, stations: np.ndarray, values: np.ndarray) -> None:
        present = ~np.isnan(values)
        self.values.setdefault(key, []).append((times[present], stations[present], values[present]))

    def _station_ids(self, part: Any) -> Any:
        columns = self.layout.station
        if not columns and self.layout.lat is not None and self.layout.lon is not None:  # stations are their places
            return part[self.layout.lat].astype(str).str.strip() + " " + part[self.layout.lon].astype(str).str.strip()
        if not columns:
            return pd.Series([self.stem] * len(part), dtype=str)
        ids = part[columns[0]].astype(str).str.strip()
        if len(columns) == 3:  # AQS: state, county, site
            widths = zip(columns, (2, 3, 4), strict=True)
            texts = [part[column].astype(str).str.strip().str.zfill(width) for column, width in widths]
            ids = texts[0] + "-" + texts[1] + "-" + texts[2]
        if (lost := ids.str.lower().isin(MISSING)).any():
            raise DataError(f"{lost.sum()} rows have no station ({', '.join(columns)})")
        return ids

    def _encode(self, ids: Any) -> np.ndarray:
        """Return the number of each id [n]."""
        codes, unique = pd.factorize(ids)
        return np.array([self.codes.setdefault(str(name), len(self.codes)) for name in unique], "int32")[codes]

    def _add_positions(self, part: Any, ids: Any) -> None:
        if self.layout.lat is None or self.layout.lon is None:
            return
        rows = pd.DataFrame({"id": ids, "lat": part[self.layout.lat], "lon": part[self.layout.lon]}).drop_duplicates()
        lats, lons = (self.numbers.read(rows[which], which).tolist() for which in ("lat", "lon"))
        try:
            merge_positions(self.positions, zip(rows["id"], lats, lons, strict=True))
        except DataError as error:
            self.findings.add(
                "decision", self.path, "", str(error), "one place for each station", "stations: TABLE OF POSITIONS"
            )

    def _find_valid(self, part: Any) -> np.ndarray:
        """Return which rows [n] are valid: EEA's validity is 1 or more for valid values, -1 or -99 for others.

        Source: http://dd.eionet.europa.eu/vocabulary/aq/observationvalidity
        """
        if self.layout.validity is None:
            return np.ones(len(part), bool)
        numbers = Numbers()
        is_valid = numbers.read(part[self.layout.validity], "validity") > 0
        if numbers.examples:
            found = numbers.examples["validity"]
            raise DataError(f"column {self.layout.validity}: {found!r}: expected numbers (1 or more: valid)")
        self.invalid += int((~is_valid).sum())
        return is_valid

    def build(self, duplicates: Duplicates, listed: Mapping[str, tuple[float, float]] | None) -> xr.Dataset:
        """Return the data set, after the findings on what was added."""
        if self.longer:
            self.findings.add("note", self.path, "", f"{self.longer} rows are means over more than an hour: not read")
        if not len(self.times):
            raise DataError("has no rows" if not self.longer else "has no hourly means")
        left_out = self._report_text()
        if self.invalid:
            self.findings.add("note", self.path, self.layout.validity or "", f"{self.invalid} rows are not valid")
        stations = sorted(self.codes)
        rank = np.empty(len(stations), "int64")
        rank[[self.codes[name] for name in stations]] = np.arange(len(stations))
        positions = self._find_positions(stations, listed)
        dataset = xr.Dataset(
            coords={
                "time": ("time", self.times),
                "station": ("station", np.array(stations, dtype=str)),
                "lat": ("station", positions[:, 0], {"units": "degrees_north"}),
                "lon": ("station", positions[:, 1], {"units": "degrees_east"}),
            }
        )
        if self.stamps.is_utc or self.layout.is_utc:
            dataset["time"].attrs["time_zone"] = "UTC"
        elif self.source.time_zone is None:
            files = self.source.path if isinstance(self.source.path, str) else ", ".join(self.source.path)
            found, line = "stamps state no time zone: read as UTC", "time_zone: UTC+8, or another, where they are local"
            self.findings.add("note", files, self.layout.time[0], found, settle=line)
        if self.layout.is_start:
            dataset["time"].attrs["stamp"] = "start"
        for name, key in _name_variables(self.values):
            if key[0] not in left_out:
                values = self._fill(name, key, rank, duplicates)
                unit = key[1] or ("degree" if key[0] in self.numbers.directions else "")
                dataset[name] = (("time", "station"), values, {"units": unit} if unit else {})
        return dataset

    def _fill(self, name: str, key: tuple[str, str], rank: np.ndarray, duplicates: Duplicates) -> np.ndarray:
        """Return the values of a variable, float64 [T, S]."""
        times, stations, values = (np.concatenate(column) for column in zip(*self.values.pop(key), strict=True))
        cells = np.searchsorted(self.times, times) * len(rank) + rank[stations]
        if duplicates == "last":
            cells, values = cells[::-1], values[::-1]
        unique, first, counts = np.unique(cells, return_index=True, return_counts=True)
        chosen = values[first]
        if (repeated := counts > 1).any():
            time, station = divmod(int(unique[repeated][0]), len(rank))
            at = f"{str(self.times[time])[:16]} at {sorted(self.codes)[station]}"
            found = f"{repeated.sum()} hours of a station have several values (first: {at})"
            if duplicates == "refuse":
                line = "rules: {duplicates: first} (or last, mean)"
                self.findings.add("decision", self.path, name, found, "one value for each hour of a station", line)
            else:
                self.findings.add("note", self.path, name, f"{found}; {duplicates} taken")
            if duplicates == "mean":
                chosen = np.bincount(np.searchsorted(unique, cells), values) / counts
        filled = np.full(len(self.times) * len(rank), np.nan)
        filled[unique] = chosen
        return filled.reshape(len(self.times), len(rank))

    def _report_text(self) -> set[str]:
        """Report text among numbers; return the names of columns of text, which are left out."""
        left_out = set()
        for name, (number, text) in self.numbers.counts.items():
            is_text = number == 0 and not any(map(str.isdigit, self.numbers.examples.get(name, "0")))
            if self.layout.kind == "columns" and is_text and name in self.layout.data:
                left_out.add(name)
                self.findings.add("note", self.path, name, f"text ({self.numbers.examples[name]!r}); not read")
            elif text:
                found = f"{text} of {number + text} values are text (first: {self.numbers.examples[name]!r})"
                expected = "numbers; empty, NA or - where missing"
                self.findings.add("decision", self.path, name, found, expected, "path: A CORRECTED FILE")
        return left_out

    def _find_positions(self, stations: list[str], listed: Mapping[str, tuple[float, float]] | None) -> np.ndarray:
        """Return latitude and longitude [S, 2]: of the list of stations, else of the table."""
        unknown = [name for name in stations if listed is not None and name not in listed]
        if unknown:
            found = f"{len(unknown)} of {len(stations)} stations are not in the list of stations (first: {unknown[0]})"
            self.findings.add("note", self.path, "", found)
        nowhere = (np.nan, np.nan)
        places = ((listed or {}).get(name, self.positions.get(name, nowhere)) for name in stations)
        return np.array(list(places), "float64")


def _name_variables(values: Mapping[tuple[str, str], Iterable]) -> list[tuple[str, tuple[str, str]]]:
    """Return a name for each (parameter, unit): with the unit where values of one parameter have several."""
    units: dict[str, list[str]] = {}
    for (name, unit), parts in values.items():
        if any(len(part[0]) for part in parts):
            units.setdefault(name, []).append(unit)
    for name, unit in values:
        units.setdefault(name, [unit])
    return [
        (f"{name} [{unit or 'no unit'}]" if len(of_name) > 1 else name, (name, unit))
        for name, of_name in units.items()
        for unit in of_name
    ]
