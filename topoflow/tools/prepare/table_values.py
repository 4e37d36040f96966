"""What the fields of a table mean: numbers and stamps."""

import collections
from typing import Any

import numpy as np
import pandas as pd

from topoflow.errors import DataError

MISSING = ("", "na", "n/a", "nan", "-", "--", "---", "null", "none", "nd", "<na>", "nat")
"""Marks of a missing value, in lower case."""

_POINTS = ("N", "NNE", "NE", "ENE", "E", "ESE", "SE", "SSE", "S", "SSW", "SW", "WSW", "W", "WNW", "NW", "NNW")
_DEGREES = {point: 22.5 * i for i, point in enumerate(_POINTS)}

_COMPACT = r"^((?:19|20)\d{6})(\d{2})(\d{2})?$"
"""2019010105 and 201901010530. Seconds since 1970 begin with 19 from 2030 on."""
_STAMP = (
    r"^(?:(?P<year>\d{4})[-/.]?(?P<month>\d{1,2})[-/.]?(?P<day>\d{1,2})"
    r"|(?P<first>\d{1,2})[-/.](?P<second>\d{1,2})[-/.](?P<last>\d{4}))"
    r"(?:[T ]\s*(?P<h>\d{1,2})(?::(?P<m>\d{2})(?::(?P<s>\d{2}(?:\.\d+)?))?)?(?:\s*(?P<half>[AaPp])\.?[Mm]\.?)?)?"
    r"\s*(?P<zone>Z|UTC|[+-]\d{2}:?\d{2})?$"
)


class Numbers:
    """Reads fields as numbers, and counts by name those that hold text.

    Attributes:
        counts: by name, how many fields hold a number and how many hold text.
        examples: by name, the first text.
        directions: names of variables with directions as words.
    """

    def __init__(self) -> None:
        self.counts: collections.defaultdict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(2, int))
        self.examples: dict[str, str] = {}
        self.directions: set[str] = set()

    def read(self, fields: Any, names: Any) -> np.ndarray:
        """Return float64 [n], NaN where missing or text; the 16 points of the compass (N, NNE, ...) in degrees.

        Args:
            fields: Series [n], text or numbers.
            names: the name of the variable, or an array [n] of names.
        """
        if fields.dtype.kind in "fiub":
            values = fields.to_numpy("float64", na_value=np.nan)
            self._count(names, np.isfinite(values), 0)
            return values
        text = fields.astype(str).str.strip()
        numbers: Any = pd.to_numeric(text, errors="coerce")
        values = numbers.to_numpy("float64", copy=True, na_value=np.nan)
        self._count(names, ~np.isnan(values), 0)
        odd = np.flatnonzero(np.isnan(values))
        odd = odd[~text.iloc[odd].str.lower().isin(MISSING).to_numpy()]
        if not len(odd):
            return values
        directions = text.iloc[odd].str.upper().map(_DEGREES)
        if directions.notna().all():
            values[odd] = directions.to_numpy("float64")
            self._count(names, np.isin(np.arange(len(values)), odd), 0)
            self.directions.update([names] if isinstance(names, str) else pd.unique(names[odd]))
            return values
        self._count(names, np.isin(np.arange(len(values)), odd), 1)
        for place in odd[:1000]:
            name = names if isinstance(names, str) else names[place]
            self.examples.setdefault(name, text.iloc[place])
        return values

    def _count(self, names: Any, which: np.ndarray, column: int) -> None:
        if isinstance(names, str):
            self.counts[names][column] += int(which.sum())
            return
        for name, count in collections.Counter(names[which]).items():
            self.counts[str(name)][column] += count


class Stamps:
    """Reads stamps: ISO 8601, 20190101, 31/12/2019, with hours 0 to 24 and a zone or none, one way in a whole file.

    Attributes:
        is_utc: whether stamps state their zone, so that they were converted; None before the first.
    """

    def __init__(self, is_day_first: bool | None = None) -> None:
        self.is_utc: bool | None = None
        self._is_day_first = is_day_first

    def read(self, frame: Any) -> np.ndarray:
        """Return datetime64[ns] [n] of the columns of a DataFrame: stamps, date and hour, or year, month, day, hour.

        Raises:
            DataError: a stamp is missing or not understood, day and month cannot be told apart, or only some stamps
                state a zone.
        """
        first = frame.iloc[:, 0]
        if isinstance(first.dtype, pd.DatetimeTZDtype):
            self._set_zone(True)
            times = first.dt.tz_convert("UTC").dt.tz_localize(None).to_numpy().astype("M8[ns]")
        elif first.dtype.kind == "M" and frame.shape[1] == 1:
            self._set_zone(False)
            times = first.to_numpy().astype("M8[ns]")
        else:
            parts = [frame.iloc[:, i].astype(str).str.strip() for i in range(frame.shape[1])]
            text = parts[0] if len(parts) < 3 else parts[0] + "-" + parts[1] + "-" + parts[2]
            text = text if len(parts) == 1 else text + " " + parts[-1]
            codes, unique = pd.factorize(text)
            times = self._parse(pd.Series(unique, dtype=str))[codes]
            first = text
        if np.isnat(times).any():
            example = first[np.isnat(times)].iloc[0]
            raise DataError(f"{np.isnat(times).sum()} stamps are missing or not understood (first: {example!r})")
        return times

    def _parse(self, text: Any) -> np.ndarray:
        text = text.str.replace(_COMPACT, lambda match: f"{match[1]} {match[2]}:{match[3] or '00'}", regex=True)
        parts: Any = text.str.extract(_STAMP)
        number: dict[str, Any] = {name: pd.to_numeric(parts[name]) for name in parts if name not in ("zone", "half")}
        half = parts["half"].str.upper()
        number["h"] = number["h"].where(half.isna(), number["h"].where(number["h"].between(1, 12)) % 12)
        number["h"] = number["h"] + 12 * (half == "P")
        if number["last"].notna().any():
            is_day_first = self._find_order(number["first"], number["second"], text)
            day, month = ("first", "second") if is_day_first else ("second", "first")
            for name, other in (("year", "last"), ("month", month), ("day", day)):
                number[name] = number[name].fillna(number[other])
        days: Any = pd.DataFrame({name: number[name] for name in ("year", "month", "day")})
        date: Any = pd.to_datetime(days, errors="coerce")
        hour, minute, second = (number[name].fillna(0).astype(float) for name in "hms")
        seconds = 3600 * hour + 60 * minute + second
        seconds = seconds.where((minute < 60) & (second < 60) & (seconds <= 86400))
        zone = parts["zone"]
        if date.notna().any():
            self._set_zone(bool(zone[date.notna()].notna().any()))
            date = date.where(zone.notna()) if self.is_utc else date
        offset = zone.fillna("Z").replace({"Z": "+0000", "UTC": "+0000"}).str.replace(":", "")
        sign = np.where(offset.str[0] == "-", -1, 1)
        east = sign * (3600 * offset.str[1:3].astype(int) + 60 * offset.str[3:5].astype(int))
        return (date + pd.to_timedelta(seconds - east, unit="s")).to_numpy().astype("M8[ns]")

    def _find_order(self, first: Any, second: Any, text: Any) -> bool:
        if self._is_day_first is None:
            if (first > 12).any() == (second > 12).any():
                example = text[first.notna()].iloc[0]
                raise DataError(f"day and month of {example!r} cannot be told apart (recipe: dates: day first)")
            self._is_day_first = bool((first > 12).any())
        return self._is_day_first

    def _set_zone(self, is_utc: bool) -> None:
        if self.is_utc not in (None, is_utc):
            raise DataError("some stamps state a time zone and some do not")
        self.is_utc = is_utc
