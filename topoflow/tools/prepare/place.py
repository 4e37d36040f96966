"""Where the values of a file are: a grid (rows north first, columns west to east) or stations."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import cf_xarray  # noqa: F401 (registers Dataset.cf)
import numpy as np
import xarray as xr

from topoflow.data.grid import SAME_PLACE_DEGREES, same_place
from topoflow.tools.prepare.cells import continuous_longitudes
from topoflow.tools.prepare.findings import Findings
from topoflow.tools.prepare.recipe import Kind, Source

USUAL_NAMES = {
    "lat": ("lat", "latitude", "nav_lat", "xlat", "xlat_m", "lats", "latitudes", "gridlat", "clat", "tlat"),
    "lon": ("lon", "longitude", "nav_lon", "xlong", "xlong_m", "lons", "longitudes", "gridlon", "clon", "tlon", "long"),
}
"""Names in lower case that coordinates have where no CF attribute says what they are, the more usual first."""

_CF_NAME = {"lat": "latitude", "lon": "longitude"}
_LIMITS = {"lat": (-90.0, 90.0), "lon": (-180.0, 360.0)}
_TIME_DIMS = ("time", "times", "valid_time", "t", "datetime", "date", "step", "tstep")


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
    pair = _find_pair(dataset, source, findings, file)
    if pair is None:
        return None
    lat = _read_degrees(dataset, "lat", pair[0], source, findings, file)
    lon = _read_degrees(dataset, "lon", pair[1], source, findings, file)
    if lat is None or lon is None:
        return None
    kind: Kind = "stations" if lat.ndim <= 1 and lat.dims == lon.dims else "grid"
    if source.kind not in (None, kind):
        found = f"{pair[0]} has dimensions {_names(lat.dims)}, {pair[1]} {_names(lon.dims)}: {_KINDS[kind]}"
        findings.add("decision", file, pair[0], found, _KINDS[source.kind or kind], f"kind: {kind}")
        return None
    if kind == "stations":
        return _build_stations(dataset, source, lat, lon, findings, file, positions)
    return _build_grid(lat, lon, findings, file)


def _names(names: Sequence[Hashable]) -> str:
    return f"({', '.join(map(str, names))})"


def _find_pair(dataset: xr.Dataset, source: Source, findings: Findings, file: object) -> tuple[str, str] | None:
    """Return the names of latitude and longitude: of all pairs that fit, the one that most variables are on."""
    candidates = {}
    for which in ("lat", "lon"):
        candidates[which] = _find_candidates(dataset, which, source)
        if which in source.names and source.names[which] not in dataset.variables:
            found = f"there is no variable {source.names[which]!r}, which the recipe names as {which}"
            findings.add("decision", file, "", found, f"one of {_names(list(dataset.variables))}", _name_line(which))
            return None
    if not (candidates["lat"] and candidates["lon"]):
        _report_no_coordinates(dataset, findings, file)
        return None
    pairs = [(lat, lon) for lat in candidates["lat"] for lon in candidates["lon"] if _is_pair(dataset, lat, lon)]
    if not pairs:
        found = ", ".join(f"{n}{_names(dataset[n].dims)}" for which in candidates.values() for n in which)
        expected = "both over the same dimensions, or over one dimension each"
        findings.add(
            "decision", file, candidates["lat"][0], f"coordinates have dimensions {found}", expected, _name_line()
        )
        return None
    uses = [_count_uses(dataset, pair) for pair in pairs]
    best = [pair for pair, count in zip(pairs, uses, strict=True) if count == max(uses)]
    # of several on the same dimensions, those with the more usual names, as XLAT before XLAT_M
    ranks = [sum(map(_rank, pair)) for pair in best]
    best = [pair for pair, rank in zip(best, ranks, strict=True) if rank == min(ranks)]
    if len(best) > 1:
        found = "several coordinates fit: " + ", ".join(_names(pair) for pair in best)
        findings.add("decision", file, best[0][0], found, "one latitude and one longitude", _name_line())
        return None
    return best[0]


def _name_line(which: str = "") -> str:
    return f"names: {{{which}: NAME}}" if which else "names: {lat: NAME, lon: NAME}"


def _find_candidates(dataset: xr.Dataset, which: str, source: Source) -> list[str]:
    if which in source.names:
        return [source.names[which]] if source.names[which] in dataset.variables else []
    # cf_xarray looks at coordinates only, and files often have theirs among the data
    known = dataset.set_coords(list(dataset.data_vars)).cf.coordinates.get(_CF_NAME[which], [])
    bounds = {variable.attrs.get("bounds") for variable in dataset.variables.values()}
    usual = [name for name in dataset.variables if str(name).lower() in USUAL_NAMES[which]]
    return [str(name) for name in dict.fromkeys([*known, *usual]) if name not in bounds]


def _rank(name: str) -> int:
    usual = [*USUAL_NAMES["lat"], *USUAL_NAMES["lon"]]
    return usual.index(name.lower()) % len(USUAL_NAMES["lat"]) if name.lower() in usual else len(usual)


def _space_dims(array: xr.DataArray) -> tuple[str, ...]:
    """Return the dimensions of a coordinate that are not time, nor of size 1 beside two others."""
    dims = [str(d) for d in array.dims if str(d).lower() not in _TIME_DIMS and array[d].dtype.kind != "M"]
    if len(dims) > 2:
        dims = [dim for dim in dims if array.sizes[dim] > 1]
    return tuple(dims)


def _is_pair(dataset: xr.Dataset, lat: str, lon: str) -> bool:
    a, b = _space_dims(dataset[lat]), _space_dims(dataset[lon])
    return (a == b and len(a) <= 2) or (len(a) == len(b) == 2 and set(a) == set(b)) or (len(a) == len(b) == 1)


def _count_uses(dataset: xr.Dataset, pair: tuple[str, str]) -> int:
    needed = {*_space_dims(dataset[pair[0]]), *_space_dims(dataset[pair[1]])}
    return sum(needed <= set(map(str, array.dims)) for name, array in dataset.data_vars.items() if name not in pair)


def _report_no_coordinates(dataset: xr.Dataset, findings: Findings, file: object) -> None:
    has_projection = any(
        "grid_mapping_name" in variable.attrs
        or str(variable.attrs.get("standard_name", "")).startswith(("projection_", "grid_l"))
        for variable in dataset.variables.values()
    )
    found = f"no latitude and longitude among {_names(list(dataset.variables))}"
    expected = "variables lat and lon in degrees, over the rows and columns"
    if has_projection:
        found += "; x and y are those of a projection"
        expected = "2-D variables lat and lon in degrees over the projection's y and x (pyproj computes them)"
    findings.add("decision", file, "", found, expected, _name_line())


def _read_degrees(
    dataset: xr.Dataset, which: str, name: str, source: Source, findings: Findings, file: object
) -> xr.DataArray | None:
    """Return a coordinate as float64 over its dimensions in space, or None after a finding."""
    array = dataset[name]
    unit = str(source.units.get(which, array.attrs.get("units", ""))).strip()
    if "deg" not in unit.lower() and unit not in ("", "°"):
        severity = "error" if "rad" in unit.lower() else "decision"
        line = "" if severity == "error" else f"units: {{{which}: degrees}}"
        findings.add(severity, file, name, f"units {unit!r}", "degrees", line)
        return None
    dims = _space_dims(array)
    others = [dim for dim in array.dims if dim not in dims]
    try:
        values = array.transpose(*others, *dims).values.astype("float64")
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        findings.add("error", file, name, f"cannot be read as numbers: {' '.join(str(error).split())}")
        return None
    values = values.reshape(-1, *(array.sizes[dim] for dim in dims))
    if not len(values):
        findings.add("error", file, name, f"no values: dimensions {dict(array.sizes)}", "at least one time")
        return None
    if not np.allclose(values, values[:1], rtol=0, atol=SAME_PLACE_DEGREES, equal_nan=True):
        findings.add(
            "error", file, name, f"changes along {_names(others)}", f"the same positions at all {_names(others)}"
        )
        return None
    return xr.DataArray(values[0], dims=dims, name=name)


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
    ids = _station_ids(dataset, source, dims, len(lats), findings, file)
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
    dataset: xr.Dataset, source: Source, dims: tuple[str, ...], count: int, findings: Findings, file: object
) -> list[str] | None:
    """Return the stations' names, or their numbers from 0 where the file has no names; None after a finding."""
    if source.names.get("station", "") not in ("", *map(str, dataset.variables)):
        found = f"there is no variable {source.names['station']!r}, which the recipe names as station"
        findings.add("decision", file, "", found, f"one of {_names(list(dataset.variables))}", _name_line("station"))
        return None
    by_role = dataset.set_coords(list(dataset.data_vars)).cf.cf_roles.get("timeseries_id", [])
    for name in (source.names.get("station"), *by_role, *dims, "station_id", "station"):
        if name is None or name not in dataset.variables or dataset[name].dims != dims:
            continue
        values = np.atleast_1d(dataset[name].values)
        ids = [
            v.decode("utf-8", "replace").strip() if isinstance(v, bytes) else str(v).strip() for v in values.tolist()
        ]
        repeated = sorted({i for i in ids if ids.count(i) > 1}) if len(set(ids)) < len(ids) else []
        if repeated:
            found = f"{len(repeated)} names of stations occur more than once (first: {repeated[0]!r})"
            findings.add("decision", file, str(name), found, "one name for each station", _name_line("station"))
            return None
        return ids
    return [str(i) for i in range(count)]


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
    where = f"{lat.shape[0]} x {lat.shape[1]} cells over {_names(lat.dims)}"
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
