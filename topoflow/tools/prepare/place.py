"""Where the values of a file are: a grid (rows north first, columns west to east) or stations."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import cf_xarray  # noqa: F401 (registers Dataset.cf)
import numpy as np
import xarray as xr

from topoflow.data.grid import SAME_PLACE_DEGREES, same_place
from topoflow.tools.prepare.cells import continuous_longitudes
from topoflow.tools.prepare.coordinates import find_pair, name_line, names_text, read_degrees
from topoflow.tools.prepare.findings import Findings
from topoflow.tools.prepare.recipe import Kind, Source

_LIMITS = {"lat": (-90.0, 90.0), "lon": (-180.0, 360.0)}


@dataclass(frozen=True)
class Place:
    """Positions of a file's values, and how to bring its arrays into their order.

    Attributes:
        kind: grid or stations.
        lat: float64 [H, W], north first, or [S]; degrees north.
        lon: float64 [H, W], west to east, or [S]; degrees east. It never jumps: 358, 359, 0, 1 became -2, -1, 0, 1, and
            179, -180 became 179, 180.
        dims: the file's names of the dimensions of rows and columns, or of the stations; empty for a single station
            whose position is a scalar.
        order: for each of `dims`, which of the file's positions are taken, in which order.
        ids: name of each station; empty for a grid.
    """

    kind: Kind
    lat: np.ndarray
    lon: np.ndarray
    dims: tuple[str, ...]
    order: tuple[slice | np.ndarray, ...]
    ids: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W) or (S,)."""
        return self.lat.shape

    def turn(self, values: np.ndarray, dims: Sequence[Hashable]) -> np.ndarray:
        """Return values [..., H, W] (or [..., S]) in the order of `lat` and `lon`; a view where that is possible.

        Args:
            values: an array as it is in the file.
            dims: the names of its dimensions; they include those of this place, in any order. The others come first in
                what is returned, in their own order.
        """
        names = [str(dim) for dim in dims]
        others = [axis for axis, name in enumerate(names) if name not in self.dims]
        values = np.transpose(values, others + [names.index(dim) for dim in self.dims])
        if not self.dims:
            return values[..., np.newaxis]
        for axis, index in enumerate(self.order, start=len(others)):
            values = values[(slice(None),) * axis + (index,)]
        return values

    def is_same(self, other: "Place") -> bool:
        """Return whether both have the same cells or stations in the same order (within 1e-4 degrees)."""
        same = same_place(self.lat, other.lat) and same_place(self.lon, other.lon)
        return same and self.kind == other.kind and self.ids == other.ids


def read_place(
    dataset: xr.Dataset,
    source: Source,
    findings: Findings,
    file: object,
    positions: Literal["refuse", "drop"] = "refuse",
) -> Place | None:
    """Return where the values of a file are, or None after a finding that says why that is unknown.

    Latitude and longitude are found by the recipe's names, CF attributes or usual names; they have one dimension or
    two, in any order and direction, and may repeat over time. If they share one dimension, the file has stations.

    Args:
        dataset: the file, with names as in the file.
        source: its `names` (lat, lon, station), `units` (lat, lon) and `kind` count.
        findings: receives what is wrong.
        file: names the file in findings.
        positions: what to do with stations whose position cannot be (missing, out of range, exactly 0 N 0 E). refuse:
            add a decision; drop: add a note. Either way they are left out of what is returned.
    """
    pair = find_pair(dataset, source, findings, file)
    if pair is None:
        return None
    lat = read_degrees(dataset, "lat", pair[0], source, findings, file)
    lon = read_degrees(dataset, "lon", pair[1], source, findings, file)
    if lat is None or lon is None:
        return None
    kind: Kind = "stations" if lat.ndim <= 1 and lat.dims == lon.dims else "grid"
    if source.kind not in (None, kind):
        found = f"{pair[0]} has dimensions {names_text(lat.dims)}, {pair[1]} {names_text(lon.dims)}: {_KINDS[kind]}"
        findings.add("decision", file, pair[0], found, _KINDS[source.kind or kind], f"kind: {kind}")
        return None
    if kind == "stations":
        return _build_stations(dataset, source, lat, lon, findings, file, positions)
    return _build_grid(lat, lon, findings, file)


def _build_stations(
    dataset: xr.Dataset,
    source: Source,
    lat: xr.DataArray,
    lon: xr.DataArray,
    findings: Findings,
    file: object,
    positions: Literal["refuse", "drop"],
) -> Place | None:
    lats, lons = np.atleast_1d(lat.values), np.atleast_1d(lon.values)
    dims = tuple(map(str, lat.dims))
    ids = _station_ids(dataset, source, dims, lats, lons, findings, file)
    if ids is None:
        return None
    inside = _is_inside("lat", lats) & _is_inside("lon", lons) & ~((lats == 0) & (lons == 0))
    if not inside.all():
        at = int(np.flatnonzero(~inside)[0])
        some = ", ".join(ids[i] for i in np.flatnonzero(~inside)[:5]) + (", ..." if (~inside).sum() > 5 else "")
        found = f"{(~inside).sum()} of {len(ids)} stations have a position that cannot be: {some}"
        found += f" (first: lat {lats[at]:g}, lon {lons[at]:g})"
        if not inside.any():
            findings.add("error", file, str(lat.name), found, "positions in degrees")
            return None
        if positions == "drop":
            findings.add("note", file, str(lat.name), f"{found}; dropped")
        else:
            findings.add("decision", file, str(lat.name), found, "positions in degrees", "rules: {positions: drop}")
    kept = np.flatnonzero(inside)
    order = () if not dims else (slice(None) if inside.all() else kept,)
    return Place("stations", lats[kept], continuous_longitudes(lons[kept]), dims, order, tuple(ids[i] for i in kept))


def _is_inside(which: str, degrees: np.ndarray) -> np.ndarray:
    low, high = _LIMITS[which]
    return (degrees >= low - SAME_PLACE_DEGREES) & (degrees <= high + SAME_PLACE_DEGREES)


def _station_ids(
    dataset: xr.Dataset,
    source: Source,
    dims: tuple[str, ...],
    lats: np.ndarray,
    lons: np.ndarray,
    findings: Findings,
    file: object,
) -> list[str] | None:
    """Return the stations' names, or their places where the file has no names; None after a finding."""
    if source.names.get("station", "") not in ("", *map(str, dataset.variables)):
        found = f"there is no variable {source.names['station']!r}, which the recipe names as station"
        findings.add("decision", file, "", found, f"one of {names_text(list(dataset.variables))}", name_line("station"))
        return None
    by_role = dataset.set_coords(list(dataset.data_vars)).cf.cf_roles.get("timeseries_id", [])
    for name in (source.names.get("station"), *by_role, *dims, "station_id", "station"):
        if name is None or name not in dataset.variables or dataset[name].dims != dims:
            continue
        try:
            values = np.atleast_1d(dataset[name].values).tolist()
        except (OSError, RuntimeError, ValueError) as error:
            findings.add("error", file, str(name), f"cannot be read: {' '.join(str(error).split())}")
            return None
        ids = [v.decode("utf-8", "replace").strip() if isinstance(v, bytes) else str(v).strip() for v in values]
        repeated = [i for i, times in Counter(ids).items() if times > 1]
        if repeated:
            found = f"{len(repeated)} names of stations occur more than once (first: {repeated[0]!r})"
            findings.add("decision", file, str(name), found, "one name for each station", name_line("station"))
            return None
        return ids
    places = [f"{lat:.4f} {lon:.4f}" for lat, lon in zip(lats, (lons + 180) % 360 - 180, strict=True)]
    repeated = Counter(places)
    return [place if repeated[place] == 1 else f"{place} ({i})" for i, place in enumerate(places)]


def _build_grid(lat: xr.DataArray, lon: xr.DataArray, findings: Findings, file: object) -> Place | None:
    for which, array in (("lat", lat), ("lon", lon)):
        outside = ~_is_inside(which, array.values)
        if outside.any():
            found = f"{outside.sum()} of {array.size} values are not positions (first: {array.values[outside][0]:g})"
            findings.add("error", file, str(array.name), found, "{:g} to {:g} degrees".format(*_LIMITS[which]))
            return None
    if lat.ndim == 1:
        lat, lon = xr.broadcast(lat, lon)
    else:
        lon = lon.transpose(*lat.dims)
        steps = [np.abs(np.diff(lat.values, axis=axis)).mean() if lat.shape[axis] > 1 else 0.0 for axis in (0, 1)]
        if steps[1] > steps[0]:
            lat, lon = lat.transpose(), lon.transpose()
    where = f"{lat.shape[0]} x {lat.shape[1]} cells over {names_text(lat.dims)}"
    if min(lat.shape) < 2:
        findings.add("error", file, str(lat.name), where, "a grid of at least 2 x 2 cells")
        return None
    lat2d, lon2d = lat.values, _unwrap_columns(lon.values)
    rows = slice(None) if lat2d[0, 0] > lat2d[-1, 0] else slice(None, None, -1)
    first = int(np.argmin(lon2d[0]))
    columns = _turned_columns(lon2d[0], first)
    lat2d, lon2d = (a[rows][:, columns] for a in (lat2d, lon2d))
    southward, eastward = -np.diff(lat2d, axis=0), np.diff(lon2d, axis=1)
    for name, steps, axis, line in ((lat.name, southward, 0, "rows"), (lon.name, eastward, 1, "columns")):
        if _has_repeats((lat2d if axis == 0 else lon2d), axis):
            found = f"two {line} at one place (within {SAME_PLACE_DEGREES:g} degrees), {where}"
            findings.add("error", file, str(name), found, f"each of the {line} once")
            return None
        if not (steps > 0).all():
            at = np.argwhere(~(steps > 0))[0]
            found = f"not monotonic along the {line} (at {line[:-1]} {at[axis]}, {where})"
            findings.add("error", file, str(name), found, f"coordinates that only rise, or only fall, along the {line}")
            return None
    return Place("grid", lat2d, lon2d, (str(lat.dims[0]), str(lat.dims[1])), (rows, columns))


def _unwrap_columns(lon2d: np.ndarray) -> np.ndarray:
    """Return longitudes [H, W] without jumps; those of a grid that goes round the world begin where the file does."""
    steps = (np.diff(lon2d, axis=1) + 180.0) % 360.0 - 180.0
    spacing = float(np.median(steps))
    goes_round = abs(spacing) * (lon2d.shape[1] + 0.5) >= 360.0
    return continuous_longitudes(lon2d, float(lon2d[0, 0 if spacing > 0 else -1]) if goes_round else None)


def _turned_columns(lon: np.ndarray, first: int) -> slice | np.ndarray:
    """Return the order of columns from west to east, where the westernmost is `first` and they run either way round."""
    count = len(lon)
    step = 1 if lon[(first + 1) % count] < lon[first - 1] else -1
    if (step, first) in ((1, 0), (-1, count - 1)):
        return slice(None, None, step)
    return (first + step * np.arange(count)) % count


def _has_repeats(degrees: np.ndarray, axis: int) -> bool:
    """Return whether two rows (axis 0) or columns (axis 1) lie at one place, next to each other or not."""
    lines = np.moveaxis(degrees, axis, 0)
    lines = lines[np.argsort(lines[:, 0], kind="stable")]
    closest = np.abs(np.diff(lines, axis=0)).max(axis=1).min()
    around = np.abs(lines[-1] - lines[0] - 360).max() if axis == 1 else np.inf
    return bool(min(closest, around) <= SAME_PLACE_DEGREES)


_KINDS: dict[Kind, str] = {"grid": "a grid", "stations": "stations"}
