"""When the values of a file are: whole hours in UTC, at the end of what a mean is taken over."""

import datetime
import re
import zoneinfo
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import xarray as xr

from topoflow.errors import DataError
from topoflow.tools.prepare.findings import Findings
from topoflow.tools.prepare.recipe import Source, Stamp
from topoflow.tools.prepare.stamps import bounds_name, find_time, read_ahead, read_stamps

_HOUR, _MINUTE, _SECOND = (np.timedelta64(1, unit).astype("m8[ns]") for unit in ("h", "m", "s"))
_HALF_HOUR = 30 * _MINUTE
_DIGITS = {"Y": 4, "m": 2, "d": 2, "H": 2, "M": 2, "j": 3}


@dataclass(frozen=True)
class Clock:
    """Times of a file.

    Attributes:
        times: datetime64[h] [T], UTC, increasing, each once; where a mean over an hour ends.
        order: int64 [n], the position in the file of each value in time, in increasing time. Positions count along
            `dims`, the last fastest. n is T, but where several values of one hour are averaged (duplicates: mean).
        index: int64 [n], the place in `times` of each of `order`: 0 to T - 1 where n is T.
        dims: the file's names of the dimensions of time: one, none for a file of one hour without such a dimension,
            two for forecasts (start and lead time).
        step_hours: greatest step that all times lie on; None for a single time.
    """

    times: np.ndarray
    order: np.ndarray
    index: np.ndarray
    dims: tuple[str, ...]
    step_hours: int | None


def read_times(
    dataset: xr.Dataset,
    source: Source,
    findings: Findings,
    file: object,
    duplicates: Literal["refuse", "first", "last", "mean"] = "refuse",
    step: int | None = None,
) -> Clock | None:
    """Return when the values of a file are, or None after a finding that says why that is unknown.

    Args:
        dataset: the file, with names as in the file, times decoded or not.
        source: its `names` (time), `time_zone` and `stamp` count. `start` and `middle` are of what lies between two
            stamps: of an hour in hourly files.
        findings: receives what is wrong.
        file: names the file in findings.
        duplicates: which value counts where the file has several for one hour. refuse: add a decision, and go on with
            the first.
        step: of forecasts: only what is so many hours after the issue counts, and its time is that of issue (so is
            `time_in_name`). None, without a finding, where the file has nothing of it.
    """
    in_name = None if source.time_in_name is None else _time_in_name(str(file), source.time_in_name)
    if source.time_in_name is not None and in_name is None:
        found = f"no time like {source.time_in_name!r} in its name"
        findings.add("error", file, "", found, "time_in_name with %Y, %m, %d, %H, as strptime has them")
        return None
    if in_name is None or step is not None:
        name = find_time(dataset, source, findings, file)
    else:
        name = "time in the name"
        dataset = dataset.assign_coords({name: in_name})
    if name is None:
        return None
    try:
        stamps, dims, is_utc = read_stamps(dataset, name)
        place_in_bounds = _place_in_bounds(dataset, name, stamps)
        ahead = None if step is None else read_ahead(dataset, name, stamps, dims)
    except (DataError, OSError, RuntimeError, ValueError, TypeError, OverflowError) as error:
        findings.add("error", file, name, " ".join(str(error).split()), "CF times in the Gregorian calendar")
        return None
    if not stamps.size or np.isnat(stamps).any():
        found = f"{np.isnat(stamps).sum()} of {stamps.size} times are missing"
        findings.add("error", file, name, found, "a time for each value")
        return None
    if place_in_bounds not in (None, source.stamp or "end"):
        found = f"stamps are at the {place_in_bounds} of their bounds ({bounds_name(dataset, name)})"
        findings.add("decision", file, name, found, f"at the {source.stamp or 'end'}", f"stamp: {place_in_bounds}")
        return None
    if source.stamp is None and dataset[name].attrs.get("stamp") == "start":  # of tables
        findings.add("decision", file, name, "stamps are the start of the hour", "their end", "stamp: start")
        return None
    utc = _to_utc(dataset, name, stamps.ravel(), is_utc, source, findings, file)
    if utc is None:
        return None
    hours = _to_hours(utc, stamps.ravel(), name, source, findings, file)
    if hours is None or step is None:
        return None if hours is None else _sort(hours, dims, name, duplicates, findings, file)
    if in_name is not None:
        ahead = stamps - in_name
    if ahead is None:
        found, expected = "no time of issue", "forecast_period or forecast_reference_time (CF)"
        findings.add("error", file, name, found, expected, "time_in_name: ..._%Y%m%d%H, that of issue")
        return None
    issued = utc - ahead.ravel()
    at_step = np.flatnonzero(np.abs(hours - issued - step * _HOUR) <= _MINUTE)
    if not len(at_step):
        return None
    clock = _sort(hours[at_step] - step, dims, name, duplicates, findings, file)
    return replace(clock, order=at_step[clock.order])


def _place_in_bounds(dataset: xr.Dataset, name: str, stamps: np.ndarray) -> Stamp | None:
    """Return where in the file's bounds of time all stamps are; None without bounds, or anywhere else."""
    of_time = bounds_name(dataset, name)
    if of_time not in dataset.variables or not stamps.size:
        return None
    array = dataset[of_time]
    if array.dtype.kind in "iuf":  # bounds have the units of what they bound, and seldom repeat them (CF 7.1)
        units = {key: dataset[name].attrs[key] for key in ("units", "calendar") if key in dataset[name].attrs}
        array = xr.decode_cf(xr.Dataset({of_time: array.assign_attrs({**units, **array.attrs})}))[of_time]
    if array.dtype.kind != "M":
        return None
    bounds = array.values.astype("M8[ns]")
    if bounds.shape != (*stamps.shape, 2) or not (bounds[..., 1] > bounds[..., 0]).all():
        return None
    at = (stamps - bounds[..., 0]) / (bounds[..., 1] - bounds[..., 0])
    places: dict[Stamp, float] = {"start": 0.0, "middle": 0.5, "end": 1.0}
    near: list[Stamp] = [place for place, fraction in places.items() if (np.abs(at - fraction) < 0.02).all()]
    return near[0] if near else None


def _time_in_name(file: str, pattern: str) -> np.datetime64 | None:
    """Return the time that the name of a file has where `pattern` (of strptime) says; None where it has none."""
    text = re.sub(r"%([YmdHMj])", lambda match: rf"\d{{{_DIGITS[match[1]]}}}", re.escape(pattern))
    found = re.search(text, Path(file).name)
    if found is None or "%Y" not in pattern:
        return None
    try:
        return np.datetime64(datetime.datetime.strptime(found[0], pattern), "ns")
    except ValueError:
        return None


def parse_zone(text: str) -> datetime.tzinfo | None:
    """Return the time zone of an IANA name (Asia/Shanghai) or offset (UTC+8, GMT-03:30, +0800), None if unknown."""
    text = text.strip()
    offset = re.match(r"(?:UTC|GMT)?\s*([+-])\s*(\d{1,2})(?::?(\d{2}))?(?![\d:])", text, re.IGNORECASE)
    if offset:
        minutes = int(offset[2]) * 60 + int(offset[3] or 0)
        if minutes >= 24 * 60:
            return None
        return datetime.timezone((1 if offset[1] == "+" else -1) * datetime.timedelta(minutes=minutes))
    if re.match(r"(UTC|GMT|Z)\b", text, re.IGNORECASE):
        return datetime.UTC
    try:
        return zoneinfo.ZoneInfo(text.split()[0])
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError, IndexError):
        return None


def _to_utc(
    dataset: xr.Dataset,
    name: str,
    stamps: np.ndarray,
    is_utc: bool,
    source: Source,
    findings: Findings,
    file: object,
) -> np.ndarray | None:
    """Return stamps [n] in UTC: of the zone that they state, else the recipe's unless the file contradicts it."""
    zone_name = "UTC" if source.time_zone is None else source.time_zone
    zone = parse_zone(zone_name)
    if zone is None:
        findings.add("error", file, name, f"time_zone {zone_name!r} is not known", "such as Asia/Shanghai or UTC+8")
        return None
    if is_utc:
        if zone != datetime.UTC:
            found = f"stamps state UTC: the recipe's time_zone {source.time_zone} is not applied"
            findings.add("note", file, name, found)
        return stamps
    utc = _localize(stamps, zone, name, zone_name, findings, file)
    if utc is None:
        return None
    attributes = (
        (where.attrs.get(key), key) for where in (dataset[name], dataset) for key in ("time_zone", "timezone")
    )
    stated, key = next((found for found in attributes if found[0]), ("", ""))
    if not stated:
        return utc
    said = parse_zone(str(stated))
    if said is not None and np.array_equal(_in_zone(stamps, said), utc):
        return utc
    found = f"attribute {key} {str(stated)!r}"
    if source.time_zone is not None:
        findings.add("note", file, name, f"{found}: the recipe's time_zone {source.time_zone} is applied")
        return utc
    line = "UTC+8" if said is None else said.key if isinstance(said, zoneinfo.ZoneInfo) else str(said)
    findings.add("decision", file, name, found, "UTC, or the time zone in the recipe", f"time_zone: {line}")
    return None


def _in_zone(stamps: np.ndarray, zone: datetime.tzinfo) -> np.ndarray:
    """Return local stamps [n] in UTC, NaT for those of an hour that the change of clocks repeats or skips."""
    local = pd.DatetimeIndex(stamps).tz_localize(zone, ambiguous="NaT", nonexistent="NaT")
    return local.tz_convert("UTC").tz_localize(None).to_numpy().astype("M8[ns]")


def _localize(
    stamps: np.ndarray, zone: datetime.tzinfo, name: str, zone_name: str, findings: Findings, file: object
) -> np.ndarray | None:
    utc = _in_zone(stamps, zone)
    unclear = np.isnat(utc)
    if not unclear.any():
        return utc
    found = f"{unclear.sum()} stamps are in an hour that the change of clocks in {zone_name} repeats or skips"
    found += f" (first: {_text(stamps[unclear][0])})"
    year = stamps[0].astype("M8[Y]").astype("int64") + 1970
    offsets = [
        datetime.datetime(int(year), month, 1, tzinfo=zone).utcoffset() or datetime.timedelta() for month in (1, 7)
    ]
    line = f"time_zone: {datetime.timezone(min(offsets))}"
    findings.add("decision", file, name, found, "stamps that keep to standard time", line)
    return None


def _to_hours(
    utc: np.ndarray, stamps: np.ndarray, name: str, source: Source, findings: Findings, file: object
) -> np.ndarray | None:
    """Return the hours [n] at which means end: stamps moved by the step or half of it, within a minute of an hour."""
    step = _step(_nearest(utc, _HALF_HOUR), _HALF_HOUR) or _HOUR
    stamp = source.stamp or "end"
    ends = utc + {"end": 0 * step, "middle": step // 2, "start": step}[stamp]
    hours = _nearest(ends, _HOUR)
    off = np.abs(ends - hours)
    shift = hours[0] - ends[0]
    if source.off_hour == "nearest" and np.abs(hours - ends - shift).max() <= _MINUTE < off.max():
        found = (
            f"times are {abs(shift) // _MINUTE} minutes {'before' if shift > 0 * _MINUTE else 'after'} the hour in UTC"
        )
        findings.add("note", file, name, f"{found}; moved to the nearest one")
        return hours.astype("M8[h]")
    if off.max() <= _MINUTE:
        if stamp != "end" and step > _HOUR:
            # hourly means with gaps look the same as means over the whole step
            found = f"stamps moved to the end of their step of {step // _HOUR} h (stamp: {stamp})"
            findings.add("note", file, name, found)
        if off.max() > _SECOND:
            found = (
                f"times are up to {off.max() / _SECOND:.0f} s off the hour (first: {_text(stamps[off > _SECOND][0])})"
            )
            findings.add("note", file, name, f"{found}; rounded")
        return hours.astype("M8[h]")
    first = stamps[off > _MINUTE][0]
    found = f"{(off > _MINUTE).sum()} of {len(off)} times are not whole hours (first: {_text(first)})"
    are_halves = (np.abs(utc - _nearest(utc, _HALF_HOUR)) <= _MINUTE).all() and (
        np.abs(utc - _nearest(utc, _HOUR)) > _MINUTE
    ).all()
    if stamp == "end" and are_halves and utc[0] == stamps[0]:
        findings.add("decision", file, name, found, "the end of the hour", "stamp: middle")
    elif stamp == "middle":
        found = f"{found}, with stamp: middle"
        findings.add("decision", file, name, found, "30 minutes past the hour", "stamp: end")
    else:
        zone = "" if utc[0] == stamps[0] else f" in UTC (time_zone {source.time_zone or 'UTC'})"
        if np.abs(hours - ends - shift).max() <= _MINUTE:  # all alike, as in zones such as UTC+5:30
            findings.add("decision", file, name, found, f"whole hours{zone}", "off_hour: nearest")
        else:
            expected = f"whole hours{zone}: average them over hours first (cdo hourmean, pandas resample)"
            findings.add("error", file, name, found, expected)
    return None


def _nearest(times: np.ndarray, unit: np.timedelta64) -> np.ndarray:
    count = (times.astype("int64") + unit.astype("int64") // 2) // unit.astype("int64")
    return (count * unit.astype("int64")).astype("M8[ns]")


def _step(times: np.ndarray, unit: np.timedelta64) -> np.timedelta64 | None:
    """Return the greatest step that all times lie on, in whole `unit`; None for a single time."""
    steps = np.diff(np.unique(times))
    return None if not len(steps) else np.gcd.reduce((steps // unit).astype("int64")) * unit


def _sort(
    hours: np.ndarray, dims: tuple[str, ...], name: str, duplicates: str, findings: Findings, file: object
) -> Clock:
    order = np.argsort(hours, kind="stable")
    if (np.diff(hours.astype("int64")) < 0).any() and len(dims) == 1:
        findings.add("note", file, name, "times are not in order; sorted")
    times, first, index, counts = np.unique(hours[order], return_index=True, return_inverse=True, return_counts=True)
    if len(times) < len(hours):
        found = f"{(counts > 1).sum()} hours occur more than once (first: {times[counts > 1][0]})"
        if duplicates == "refuse":
            findings.add("decision", file, name, found, "each hour once", "rules: {duplicates: first}")
        else:
            findings.add("note", file, name, f"{found}; {duplicates} taken")
        if duplicates != "mean":
            order = order[first + counts - 1] if duplicates == "last" else order[first]
            index = np.arange(len(times))
    step = _step(times.astype("M8[ns]"), _HOUR)
    return Clock(times, order, index, dims, None if step is None else int(step // _HOUR))


def _text(time: np.datetime64) -> str:
    return str(time.astype("M8[s]")).replace("T", " ")
