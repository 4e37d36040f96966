"""The variables that are known by name: their units, and how people read them."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Variable:
    """One physical variable: `unit` is that of prepared data, `display_unit` what people read.

    A value to be shown is the stored value times `display_scale`. Kinds: `dynamic` changes with time; `static` does
    not; both are prepared. `computed` is made from the clock, the coordinates or the other inputs.
    """

    name: str
    kind: Literal["dynamic", "static", "computed"]
    unit: str
    long_name: str
    display_unit: str
    display_scale: float = 1.0


def _variable(name: str, kind: Literal["dynamic", "static", "computed"], unit: str, long_name: str) -> Variable:
    return Variable(name, kind, unit, long_name, display_unit=unit)


VARIABLES: dict[str, Variable] = {
    variable.name: variable
    for variable in (
        _variable("u", "dynamic", "m s-1", "eastward wind"),
        _variable("v", "dynamic", "m s-1", "northward wind"),
        _variable("temp", "dynamic", "K", "air temperature"),
        _variable("rh", "dynamic", "%", "relative humidity"),
        _variable("psfc", "dynamic", "Pa", "surface pressure"),
        _variable("pm25", "dynamic", "ug m-3", "PM2.5"),
        _variable("pm10", "dynamic", "ug m-3", "PM10"),
        _variable("so2", "dynamic", "ug m-3", "SO2"),
        _variable("no2", "dynamic", "ug m-3", "NO2"),
        Variable("co", "dynamic", "ug m-3", "CO", display_unit="mg m-3", display_scale=1e-3),
        _variable("o3", "dynamic", "ug m-3", "O3"),
        _variable("elevation", "static", "m", "terrain height above sea level"),
        _variable("population", "static", "1", "people in the cell"),
        _variable("lat2d", "computed", "degrees_north", "latitude of the cell"),
        _variable("lon2d", "computed", "degrees_east", "longitude of the cell"),
        _variable("hour_sin", "computed", "1", "sine of the hour of day, by the clock of the data"),
        _variable("hour_cos", "computed", "1", "cosine of the hour of day, by the clock of the data"),
        _variable("day_sin", "computed", "1", "sine of the day of year"),
        _variable("day_cos", "computed", "1", "cosine of the day of year"),
        _variable("available", "computed", "1", "fraction of the dynamic inputs that have a value in the cell"),
    )
}

POLLUTANTS = ("pm25", "pm10", "so2", "no2", "co", "o3")

UNNORMALIZED = ("hour_sin", "hour_cos", "day_sin", "day_cos", "available")
"""Computed inputs that are of order 1 as they are: the network sees them with mean 0 and standard deviation 1."""


def known_or_plain(name: str, unit: str = "") -> Variable:
    """Return a variable of prepared data: one that is known by name, or a further one, shown as it is."""
    return VARIABLES.get(name) or _variable(name, "dynamic", unit, name)
