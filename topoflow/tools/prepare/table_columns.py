"""What the columns of a table of stations are: recognized by their names, or named by the recipe."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from topoflow.errors import DataError

USUAL_NAMES: Mapping[str, tuple[str, ...]] = {
    "lat": ("latitude", "lat", "纬度", "latitud"),
    "lon": ("longitude", "lon", "lng", "long", "经度", "longitud"),
    "station": (
        *("samplingpoint", "stationid", "idstation", "locationid", "station", "stationcode", "siteid", "site"),
        *("sitecode", "airqualitystation", "监测点编码", "cveestac", "sensorid"),
    ),
    "parameter": ("parametercode", "parameter", "idparameter", "pollutant", "airpollutant", "type"),
    "value": ("value", "samplemeasurement", "concentration", "valor"),
    "unit": ("unit", "units", "unitsofmeasure", "unitofmeasurement"),
    "validity": ("validity",),
}
"""Names of columns in lower case without spaces and signs; the first that a table has is taken."""

# UTC before local time; dates with hours before dates alone
_TIMES: tuple[tuple[str, ...], ...] = (
    *(("dategmt", "timegmt"), ("datetimeutc",), ("dateutc",), ("timeutc",), ("utc",)),
    *(("datetimeend",), ("datetimebegin",), ("end",), ("start",)),
    *(("datelocal", "timelocal"), ("year", "month", "day", "hour"), ("date", "hour"), ("fecha", "hora")),
    *(("date", "time"), ("datetimelocal",), ("datetime",), ("timestamp",), ("validtime",), ("time",), ("date",)),
    ("fecha",),
)
_BEGINS = {"datetimebegin": "datetimeend", "start": "end"}
_IN_UTC = {("dategmt", "timegmt"), ("datetimeutc",), ("dateutc",), ("timeutc",), ("utc",)}
_AQS_STATION = ("statecode", "countycode", "sitenum")
_NO_VALUES = {"no", "index", "id", "unnamed0", "column1"}


@dataclass(frozen=True)
class Layout:
    """Columns of a table by what they hold.

    Attributes:
        kind: long: one value a row; wide: one column a station; columns: one column a variable.
        time: one column of stamps, date and hour, or year, month, day and hour.
        is_utc: whether the names of these say that they are in UTC.
        is_start: whether they are known to be the start of the hour.
        other_end: the column with the other end of what a mean is taken over.
        station: columns that together name the station of a row; empty: one column a station, or a single station.
        data: stations (wide) or variables (columns).
    """

    kind: Literal["long", "wide", "columns"]
    time: tuple[str, ...]
    is_utc: bool
    is_start: bool
    other_end: str | None
    station: tuple[str, ...]
    lat: str | None
    lon: str | None
    parameter: str | None
    value: str | None
    unit: str | None
    validity: str | None
    data: tuple[str, ...]

    def columns(self) -> list[str]:
        """Return the columns that are read."""
        others = (self.lat, self.lon, self.parameter, self.value, self.unit, self.validity, self.other_end)
        return [*dict.fromkeys([*self.time, *self.station, *(c for c in others if c), *self.data])]


def key_of(name: str) -> str:
    """Return a name in lower case, without spaces and signs."""
    return re.sub(r"[\W_]", "", name).casefold()


def find_column(columns: list[str], role: str, names: Mapping[str, str]) -> str | None:
    """Return the column with a role (lat, lon, station, ...): the recipe's, else the first with a usual name.

    Raises:
        DataError: the recipe names a column that is not there.
    """
    if role in names:
        if names[role] in columns:
            return names[role]
        raise DataError(f"has no column {names[role]!r}, which the recipe names as {role}: {_some(columns)}")
    by_key = {key_of(name): name for name in reversed(columns)}
    return next((by_key[key] for key in USUAL_NAMES[role] if key in by_key), None)


def find_layout(
    columns: list[str], names: Mapping[str, str], stamp: str | None, stations: Collection[str] = ()
) -> Layout:
    """Return what the columns are.

    Args:
        columns: names of the table's columns.
        names: the recipe's: time, lat, lon, station, parameter, value to columns.
        stamp: of the recipe; where a table has the start and the end of each hour, it says which is taken.
        stations: ids of the list of stations; columns with these names are stations.

    Raises:
        DataError: there is no time, or the recipe names a column that is not there.
    """
    time, is_utc = _find_time(columns, names, stamp)
    roles = {role: find_column(columns, role, names) for role in USUAL_NAMES}
    by_key = {key_of(name): name for name in columns}
    station = (roles["station"],) if roles["station"] else ()
    if "station" not in names and all(key in by_key for key in _AQS_STATION):
        station = tuple(by_key[key] for key in _AQS_STATION)
    taken = {*time, *station, roles["lat"], roles["lon"], roles["unit"], roles["validity"]}
    times = {key for group in _TIMES for key in group}
    data = [c for c in columns if c not in taken and key_of(c) not in times | _NO_VALUES]
    ends = {**_BEGINS, **{end: begin for begin, end in _BEGINS.items()}}
    other_end = by_key.get(ends.get(key_of(time[0]), "")) if len(time) == 1 else None
    # the EPA's "Time Local" is when the sample began (aqs.epa.gov/aqsweb/airdata/FileFormats.html)
    is_start = key_of(time[0]) in _BEGINS or all(key in by_key for key in _AQS_STATION)
    common = (time, is_utc, is_start, other_end, station, roles["lat"], roles["lon"])
    if roles["value"] and roles["parameter"]:
        return Layout("long", *common, roles["parameter"], roles["value"], roles["unit"], roles["validity"], ())
    # CNEMC: `date,hour,type,1001A,...`; RAMA: `FECHA,HORA,ACO,...`, known by the list of stations
    in_rows = [c for c in data if c != roles["parameter"]]
    if not station and in_rows and (roles["parameter"] or sum(c in stations for c in in_rows) * 2 >= len(in_rows)):
        return Layout("wide", *common, roles["parameter"], None, None, None, tuple(in_rows))
    if not data:
        raise DataError(f"has no columns of values: {_some(columns)}")
    return Layout("columns", *common, None, None, None, roles["validity"], tuple(data))


def _find_time(columns: list[str], names: Mapping[str, str], stamp: str | None) -> tuple[tuple[str, ...], bool]:
    if "time" in names:
        if names["time"] not in columns:
            raise DataError(f"has no column {names['time']!r}, which the recipe names as time: {_some(columns)}")
        key = (key_of(names["time"]),)
        return (names["time"],), key in _IN_UTC
    by_key = {key_of(name): name for name in columns}
    groups = [group for group in _TIMES if all(key in by_key for key in group)]
    if stamp == "start":  # of the start and the end of an hour, the one that the recipe says
        groups = [g for g in groups if not any(g[0] == end and begin in by_key for begin, end in _BEGINS.items())]
    if not groups:
        raise DataError(f"has no column of times (recipe: names: {{time: COLUMN}}): {_some(columns)}")
    return tuple(by_key[key] for key in groups[0]), groups[0] in _IN_UTC


def _some(columns: list[str]) -> str:
    return f"it has {', '.join(columns[:12])}{', ...' if len(columns) > 12 else ''}"
