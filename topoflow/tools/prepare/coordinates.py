"""Latitude and longitude of a file: which variables they are, and their values in degrees."""

import re
from collections.abc import Hashable, Sequence

import cf_xarray  # noqa: F401 (registers Dataset.cf)
import numpy as np
import xarray as xr

from topoflow.data.grid import SAME_PLACE_DEGREES
from topoflow.tools.prepare.findings import Findings
from topoflow.tools.prepare.recipe import Source
from topoflow.tools.prepare.stamps import bounds_name

USUAL_NAMES = {
    "lat": ("lat", "latitude", "nav_lat", "xlat", "xlat_m", "lats", "latitudes", "gridlat", "clat", "tlat"),
    "lon": ("lon", "longitude", "nav_lon", "xlong", "xlong_m", "lons", "longitudes", "gridlon", "clon", "tlon", "long"),
}
"""Names in lower case that coordinates have where no CF attribute says what they are, the more usual first."""

_CF_NAME = {"lat": "latitude", "lon": "longitude"}
_DEGREES = {
    which: re.compile(rf"|°|(decimal[ _]?)?deg(ree)?s?([ _]?({ends}))?", re.IGNORECASE)
    for which, ends in (("lat", "n|north"), ("lon", "e|east"))
}
_BLOCK = 64
"""Positions along time that coordinates are compared at together."""
_TIME_DIMS = ("time", "times", "valid_time", "t", "datetime", "date", "step", "tstep")


def names_text(names: Sequence[Hashable]) -> str:
    """Return names for a message."""
    return f"({', '.join(map(str, names))})"


def find_pair(dataset: xr.Dataset, source: Source, findings: Findings, file: object) -> tuple[str, str] | None:
    """Return the names of latitude and longitude: of all pairs that fit, the one that most variables are on."""
    candidates = {}
    for which in ("lat", "lon"):
        candidates[which] = _find_candidates(dataset, which, source)
        if which in source.names and source.names[which] not in dataset.variables:
            found = f"there is no variable {source.names[which]!r}, which the recipe names as {which}"
            findings.add("decision", file, "", found, f"one of {names_text(list(dataset.variables))}", name_line(which))
            return None
    if not (candidates["lat"] and candidates["lon"]):
        _report_no_coordinates(dataset, findings, file)
        return None
    pairs = [(a, b) for a in candidates["lat"] for b in candidates["lon"] if a != b and _is_pair(dataset, a, b)]
    if not pairs:
        found = ", ".join(f"{n}{names_text(dataset[n].dims)}" for which in candidates.values() for n in which)
        expected = "both over the same dimensions, or over one dimension each"
        findings.add(
            "decision", file, candidates["lat"][0], f"coordinates have dimensions {found}", expected, name_line()
        )
        return None
    uses = [_count_uses(dataset, pair) for pair in pairs]
    best = [pair for pair, count in zip(pairs, uses, strict=True) if count == max(uses)]
    # of several on the same dimensions, those with the more usual names, as XLAT before XLAT_M
    ranks = [sum(map(_rank, pair)) for pair in best]
    best = [pair for pair, rank in zip(best, ranks, strict=True) if rank == min(ranks)]
    if len(best) > 1:
        found = "several coordinates fit: " + ", ".join(names_text(pair) for pair in best)
        findings.add("decision", file, best[0][0], found, "one latitude and one longitude", name_line())
        return None
    return best[0]


def name_line(which: str = "") -> str:
    """Return the recipe line that says which variable is latitude, longitude or station."""
    return f"names: {{{which}: NAME}}" if which else "names: {lat: NAME, lon: NAME}"


def _find_candidates(dataset: xr.Dataset, which: str, source: Source) -> list[str]:
    if which in source.names:
        return [source.names[which]] if source.names[which] in dataset.variables else []
    # cf_xarray looks at coordinates only, and files often have theirs among the data
    known = dataset.set_coords(list(dataset.data_vars)).cf.coordinates.get(_CF_NAME[which], [])
    bounds = {bounds_name(dataset, str(name)) for name in dataset.variables}
    usual = [name for name in dataset.variables if str(name).lower() in USUAL_NAMES[which]]
    return [str(name) for name in dict.fromkeys([*known, *usual]) if name not in bounds]


def _rank(name: str) -> int:
    ranks = [names.index(name.lower()) for names in USUAL_NAMES.values() if name.lower() in names]
    return ranks[0] if ranks else 99


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
    found = f"no latitude and longitude among {names_text(list(dataset.variables))}"
    expected = "variables lat and lon in degrees, over the rows and columns"
    if has_projection:
        found += "; x and y are those of a projection"
        expected = "2-D variables lat and lon in degrees over the projection's y and x (pyproj computes them)"
    findings.add("decision", file, "", found, expected, name_line())


def read_degrees(
    dataset: xr.Dataset, which: str, name: str, source: Source, findings: Findings, file: object
) -> xr.DataArray | None:
    """Return a coordinate as float64 over its dimensions in space, or None after a finding."""
    array = dataset[name]
    unit = str(source.units.get(which, array.attrs.get("units", ""))).strip()
    if not _DEGREES[which].fullmatch(unit):
        is_radian = "rad" in unit.lower()
        line = "" if is_radian else f"units: {{{which}: degrees}}"
        findings.add("error" if is_radian else "decision", file, name, f"units {unit!r}", "degrees", line)
        return None
    if not array.size or array.dtype.kind not in "iufSUOT":
        findings.add("error", file, name, f"dtype {array.dtype}, dimensions {dict(array.sizes)}", "numbers")
        return None
    dims = _space_dims(array)
    others = [dim for dim in array.dims if dim not in dims]
    try:
        fixed = array.isel(dict.fromkeys(others, 0)).astype("float64").load()
        steps = range(0, array.sizes[others[0]], _BLOCK) if others else ()
        blocks = (array.isel({others[0]: slice(at, at + _BLOCK)}).transpose(*others, *dims).values for at in steps)
        is_fixed = all(_is_near(block.astype("float64"), fixed.values) for block in blocks)
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        findings.add("error", file, name, f"cannot be read as numbers: {' '.join(str(error).split())}")
        return None
    if not is_fixed:
        expected = f"the same positions at all {names_text(others)}"
        findings.add("error", file, name, f"changes along dimensions {names_text(others)}", expected)
        return None
    return xr.DataArray(fixed.values, dims=dims, name=name)


def _is_near(a: np.ndarray, b: np.ndarray) -> bool:
    return np.allclose(a, b, rtol=0, atol=SAME_PLACE_DEGREES, equal_nan=True)
