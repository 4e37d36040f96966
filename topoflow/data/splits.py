"""Which hours belong to training, validation and test, and at which of them a forecast can start."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from topoflow.errors import ConfigError, DataError

Range = int | tuple[str, str]
"""A year, or [start, end] with both ends included."""

_HOUR = np.timedelta64(1, "h")
_MOMENT = re.compile(r"(?P<date>\d{4}-\d{2}-\d{2})(?:[T ](?P<hour>\d{2})(?::00(?::00)?)?)?")


@dataclass(frozen=True)
class StartIndex:
    """starts: int64 [n], positions in `times` where a forecast can start, increasing.

    dropped_for_gaps: hours of the data that would be starts too, did not their window cross a gap in time.
    without_forecast: those that would be starts too, had data.forecast one for them.
    """

    starts: np.ndarray
    dropped_for_gaps: int
    without_forecast: int = 0


def parse_range(given: Range, key: str) -> tuple[np.datetime64, np.datetime64]:
    """(first hour, last hour), both included, datetime64[h]. ConfigError naming `key` if it is no year and no range."""
    if isinstance(given, int):
        if not 1 <= given <= 9999:
            raise ConfigError(f"{key}: {given!r} is not a year")
        return np.datetime64(f"{given:04d}-01-01T00", "h"), np.datetime64(f"{given:04d}-12-31T23", "h")
    if isinstance(given, str) or len(given) != 2:
        raise ConfigError(f"{key}: {given!r} is not usable: expected a year or a [start, end] range")
    start, end = _parse_moment(given[0], "T00", key), _parse_moment(given[1], "T23", key)
    if end < start:
        raise ConfigError(f"{key}: {_show(given)} ends before it starts")
    return start, end


def split_times(times: np.ndarray, ranges: Sequence[Range], step_hours: int = 1, key: str = "split") -> np.ndarray:
    """int64 positions in `times` of all of them in `ranges`.

    times: datetime64[h] [T], increasing, step_hours apart but for gaps. Raises ConfigError naming `key` for a range
    that cannot be read or that shares hours with another of them, and DataError for a range that the data do not reach:
    a [start, end] with an end outside them, a year without an hour.
    """
    positions = [np.arange(*_limits(times, given, step_hours, key)) for given in ranges]
    check_disjoint(**{key: ranges})
    return np.sort(np.concatenate(positions)).astype(np.int64)


def split_starts(
    times: np.ndarray,
    ranges: Sequence[Range],
    window_hours: tuple[int, int],
    step_hours: int = 1,
    key: str = "split",
) -> StartIndex:
    """The hours of `ranges` about which the whole window lies in the same range, with no time of it missing.

    times: datetime64[h] [T], increasing, step_hours apart but for gaps. window_hours: its first and last hour, relative
    to the start, multiples of step_hours. Raises as `split_times` does, and DataError if there is no start at all.
    """
    check_disjoint(**{key: ranges})
    first, last = window_hours
    starts, dropped = [], 0
    for given in ranges:
        begin, end = _limits(times, given, step_hours, key)
        inside = times[begin:end]
        lower, upper = parse_range(given, key)
        candidates = np.flatnonzero((inside + first * _HOUR >= lower) & (inside + last * _HOUR <= upper))
        a, b = candidates + first // step_hours, candidates + last // step_hours
        complete = (a >= 0) & (b < len(inside))
        complete[complete] = inside[b[complete]] - inside[a[complete]] == (last - first) * _HOUR
        starts.append(begin + candidates[complete])
        dropped += int(np.sum(~complete))
    index = StartIndex(np.sort(np.concatenate(starts)).astype(np.int64), dropped)
    if len(index.starts) == 0:
        raise DataError(
            f"{key}: no window from {first:+d} h to {last:+d} h fits into {', '.join(map(_show, ranges))} "
            f"({dropped} were dropped because of gaps in the data)"
        )
    return index


def check_disjoint(**splits: Sequence[Range]) -> None:
    """ConfigError, naming both, if two ranges of the named splits (train=..., validation=...) share an hour."""
    parsed = sorted(
        (*parse_range(given, _key(name)), _key(name), _show(given))
        for name, ranges in splits.items()
        for given in ranges
    )
    for before, after in itertools.pairwise(parsed):
        if after[0] <= before[1]:
            raise ConfigError(
                f"{before[2]}: {before[3]} overlaps {after[2]}: {after[3]}: expected ranges that share no hour"
            )


def _limits(times: np.ndarray, given: Range, step_hours: int, key: str) -> tuple[int, int]:
    """Positions [begin, end) of a range in `times`; DataError if the data do not reach it.

    A time stands for the hours until the next one: a day of three-hourly data ends at 21 h.
    """
    start, end = parse_range(given, key)
    begin, stop = np.searchsorted(times, [start, end + _HOUR])
    outside = start < times[0] or end >= times[-1] + step_hours * _HOUR
    if begin == stop or (outside and not isinstance(given, int)):
        raise DataError(f"{key}: {_show(given)} is not in the data, which cover {times[0]} to {times[-1]}")
    return int(begin), int(stop)


def _key(name: str) -> str:
    return f"data.{name}" if name in ("train", "validation", "test") else name


def _show(given: Range) -> str:
    return str(given) if isinstance(given, int) else f"[{', '.join(map(str, given))}]"


def _parse_moment(text: str, hour: str, key: str) -> np.datetime64:
    match = _MOMENT.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is not None:
        try:
            return np.datetime64(match["date"] + (f"T{match['hour']}" if match["hour"] else hour), "h")
        except ValueError:  # a month 13, an hour 25
            pass
    raise ConfigError(f"{key}: {text!r} is not a time: expected YYYY-MM-DD or YYYY-MM-DDTHH")
