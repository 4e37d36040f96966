"""Stamps of a file as it has them: which variable is the time, and what its dates, texts or numbers mean."""

import re
from collections.abc import Hashable, Sequence

import cf_xarray  # noqa: F401 (registers Dataset.cf)
import numpy as np
import pandas as pd
import xarray as xr

from topoflow.errors import DataError
from topoflow.tools.prepare.findings import Findings
from topoflow.tools.prepare.recipe import Source

USUAL_NAMES = ("valid_time", "time", "times", "datetime", "date", "xtime", "t")
"""Names of time in lower case, the first the first choice: CDS and cfgrib have `time` for the start of a forecast."""

_PERIODS = ("step", "forecast_period", "leadtime", "lead_time")
_HOUR, _MINUTE, _SECOND = (np.timedelta64(1, unit).astype("m8[ns]") for unit in ("h", "m", "s"))
_GREGORIAN = ("standard", "gregorian", "proleptic_gregorian")


def find_time(dataset: xr.Dataset, source: Source, findings: Findings, file: object) -> str | None:
    """Return the name of the variable with the time of the values, or None after a finding."""
    line = "names: {time: NAME}"
    names = [str(name) for name in dataset.variables]
    if "time" in source.names:
        if source.names["time"] in names:
            return source.names["time"]
        found = f"there is no variable {source.names['time']!r}, which the recipe names as time"
        findings.add("decision", file, "", found, f"one of ({', '.join(names)})", line)
        return None
    for name in ("Times", "TFLAG"):  # WRF and CMAQ: exact, where their other times are rounded or missing
        if name in names:
            return name
    by_attributes = dataset.set_coords(list(dataset.data_vars)).cf.coordinates.get("time", [])
    bounds = {str(bounds_name(dataset, name)) for name in names}
    ranks = {name: _rank(dataset[name], name in by_attributes) for name in names if name not in bounds}
    best = [name for name, rank in ranks.items() if rank is not None and rank == min(filter(None, ranks.values()))]
    if not best:
        line = f"{line}, or time_in_name: ..._%Y%m%d%H"
        findings.add("decision", file, "", f"no time among ({', '.join(names)})", "a variable with CF times", line)
        return None
    if len(best) > 1:
        findings.add("decision", file, best[0], f"several times: {', '.join(best)}", "one of them", line)
        return None
    return best[0]


def _rank(array: xr.DataArray, is_known: bool) -> int | None:
    """Return a number from 1 that is lower for what is more surely the time of the values; None for no time."""
    name, standard_name = str(array.name).lower(), array.attrs.get("standard_name")
    if array.dtype.kind == "m" and name != "time":
        return None
    if standard_name == "forecast_reference_time":
        return 100
    if name in USUAL_NAMES:
        return 1 + USUAL_NAMES.index(name)
    if is_known or (array.dtype.kind == "M" and array.name in array.dims):
        return 50
    return None


def bounds_name(dataset: xr.Dataset, name: str) -> str | None:
    """Return the name that a variable gives for its bounds (CF), if it gives one."""
    array = dataset[name]
    bounds = array.attrs.get("bounds", array.encoding.get("bounds"))
    return bounds if isinstance(bounds, str) else None


def read_stamps(dataset: xr.Dataset, name: str) -> tuple[np.ndarray, tuple[str, ...], bool]:
    """Return stamps as datetime64[ns], the names of their dimensions, and whether they state themselves to be UTC.

    DataError, or another error of a library, says what they are if not times.
    """
    array = dataset[name]
    if name == "TFLAG":
        return *_read_tflag(array), True
    if array.dtype == "S1" and array.ndim:  # characters that were not joined
        rows = array.values.reshape(-1, array.shape[-1])
        joined = np.array([b"".join(row) for row in rows]).reshape(array.shape[:-1])
        array = xr.DataArray(joined, dims=array.dims[:-1], name=name)
    if array.dtype.kind in "iuf" and "since" in str(array.attrs.get("units", "")):
        array = xr.decode_cf(dataset[[name]])[name]
    if array.dtype.kind in "SUO" or array.dtype.kind == "T":
        values, is_utc = _parse_text(array)
    elif array.dtype.kind == "M":
        values = array.values
        is_utc = (
            re.search(r"since.*\d.*(UTC|GMT|Z|[+-]\d{1,2}:?\d{2})\s*$", str(array.encoding.get("units"))) is not None
        )
    else:
        values, is_utc = _parse_numbers(array), True
    values, dims = values.astype("M8[ns]"), tuple(map(str, array.dims))
    period = _find_period(dataset, array)
    if period is not None:
        values, dims = np.add.outer(values, _read_period(period)), (*dims, *map(str, period.dims))
    return values, dims, is_utc or array.attrs.get("time_zone") == "UTC"


def read_ahead(dataset: xr.Dataset, name: str, stamps: np.ndarray, dims: tuple[str, ...]) -> np.ndarray | None:
    """Return how long after the issue of their forecast stamps are, timedelta64[ns] of their shape.

    None where the file does not say: neither lead times, nor a time of issue (CF, or WRF's start of the simulation).

    Args:
        dataset: the file.
        name: of its time.
        stamps, dims: as `read_stamps` returned them.
    """
    added = _find_period(dataset, dataset[name])
    others = [dataset[other] for other in dataset.variables if other != name]
    periods = [array for array in others if _is_period(array)] if added is None else [added]
    for period in periods:
        if set(period.dims) <= set(dims):
            return _along(_read_period(period), period.dims, dims, stamps.shape)
    for array in others:
        is_issue = array.attrs.get("standard_name") == "forecast_reference_time"
        if is_issue and set(array.dims) <= set(dims):
            issued, own, _ = read_stamps(dataset.drop_vars([p.name for p in periods]), str(array.name))
            return stamps - _along(issued, own, dims, stamps.shape)
    base = re.search(r"time from (\d{8})", str(dataset[name].attrs.get("long_name", "")))  # see _parse_numbers
    text = f"{base[1][:4]}-{base[1][4:6]}-{base[1][6:]}" if base else dataset.attrs.get("SIMULATION_START_DATE")
    return None if text is None else stamps - np.datetime64(str(text).replace("_", "T"), "ns")


def _along(values: np.ndarray, own: Sequence[Hashable], dims: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Return `values` over the dimensions `own`, repeated over those of `dims` that they lack."""
    ordered = np.transpose(values, [list(own).index(dim) for dim in dims if dim in own])
    sizes = [size if dim in own else 1 for dim, size in zip(dims, shape, strict=True)]
    return np.broadcast_to(ordered.reshape(sizes), shape)


def _is_period(array: xr.DataArray) -> bool:
    return array.attrs.get("standard_name") == "forecast_period" or str(array.name).lower() in _PERIODS


def _read_tflag(array: xr.DataArray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return CMAQ's times, which are UTC: TFLAG (TSTEP, VAR, 2) holds YYYYDDD and HHMMSS (Models-3 I/O API)."""
    if array.ndim != 3 or 0 in array.shape or array.shape[2] != 2 or array.dtype.kind not in "iu":
        raise DataError(
            f"dtype {array.dtype} and dimensions {dict(array.sizes)} are not those of TFLAG (TSTEP, VAR, 2)"
        )
    day, clock = (array.values[:, 0, i].astype("int64") for i in (0, 1))
    days = (day // 1000 - 1970).astype("M8[Y]").astype("M8[D]") + (day % 1000 - 1)
    seconds = clock // 10000 * 3600 + clock // 100 % 100 * 60 + clock % 100
    return days.astype("M8[ns]") + seconds * _SECOND, (str(array.dims[0]),)


def _parse_text(array: xr.DataArray) -> tuple[np.ndarray, bool]:
    """Return times of texts (ISO 8601, WRF's 2019-01-01_00:00:00), and whether they state a time zone."""
    values = array.values
    calendar = getattr(values.flat[0] if values.size else None, "calendar", None)  # of cftime objects
    if calendar in _GREGORIAN:
        raise DataError(f"times from {values.flat[0]}: before the Gregorian calendar")
    if calendar is not None:
        raise DataError(f"calendar {calendar!r}: its days are not those of the Gregorian calendar")
    texts = [v.decode("ascii", "replace") if isinstance(v, bytes) else str(v) for v in values.ravel().tolist()]
    texts = [text.strip().replace("_", "T", 1) for text in texts]
    has_zone = {re.search(r":\d.*(Z|[+-]\d{2}:?\d{2})$", text) is not None for text in texts}
    if len(has_zone) > 1:
        raise DataError("some times state a time zone and others do not")
    times = pd.to_datetime(pd.Series(texts), format="ISO8601", utc=True).dt.tz_localize(None)
    return times.to_numpy().reshape(values.shape), True in has_zone


def _parse_numbers(array: xr.DataArray) -> np.ndarray:
    """Return times of numbers that CF does not know: CAMS's hours from a day, and days as %Y%m%d.%f."""
    unit = str(array.attrs.get("units", array.encoding.get("units", "")))
    base = re.search(r"time from (\d{8})", str(array.attrs.get("long_name", "")))
    if base and (array.dtype.kind == "m" or unit == "hours"):
        # the files of European air quality in the Atmosphere Data Store: "FORECAST time from 20211027"
        return np.datetime64(f"{base[1][:4]}-{base[1][4:6]}-{base[1][6:]}", "ns") + _read_period(array)
    if unit.startswith("day as %Y%m%d"):
        days = np.floor(array.values.astype("float64"))
        whole = pd.to_datetime(pd.Series(days.ravel().astype("int64").astype(str)), format="%Y%m%d").to_numpy()
        seconds = np.round((array.values.astype("float64") - days) * 86400)
        return whole.reshape(days.shape).astype("M8[ns]") + seconds.astype("int64") * _SECOND
    raise DataError(
        f"numbers (dtype {array.dtype}, units {unit!r}) that are not CF times such as 'hours since 1970-01-01'"
    )


def _find_period(dataset: xr.Dataset, time: xr.DataArray) -> xr.DataArray | None:
    """Return the lead times of forecasts, where `time` is when they start."""
    is_start = time.attrs.get("standard_name") == "forecast_reference_time"
    for name, array in dataset.variables.items():
        if (
            _is_period(dataset[name])
            and str(time.name).lower() != "valid_time"
            and not set(array.dims) & set(time.dims)
        ):
            return dataset[name] if is_start or array.ndim else None
    return None


def _read_period(array: xr.DataArray) -> np.ndarray:
    if array.dtype.kind == "m":
        return array.values.astype("m8[ns]")
    unit = str(array.attrs.get("units", "hours")).lower()
    for length, names in ((_HOUR, ("h", "hour", "hours")), (_MINUTE, ("min", "minutes")), (24 * _HOUR, ("d", "days"))):
        if unit in names:
            return np.round(array.values.astype("float64") * (length / _SECOND)).astype("int64") * _SECOND
    raise DataError(f"lead times {array.name} in units {unit!r}")
