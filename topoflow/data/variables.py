"""The variables that TopoFlow knows, and the spellings of their units."""

import difflib
import itertools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from topoflow.errors import ConfigError, DataError


@dataclass(frozen=True)
class Variable:
    """One physical variable: `unit` is what a data file must hold, `display_unit` what people read.

    A value to be shown is the stored value times `display_scale`. Kinds: `dynamic` changes with time and is read from
    the store, dims (time, lat, lon); `static` is read from the store, dims (lat, lon); `computed` is made by the reader
    from the clock, the coordinates or the other inputs.
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


def check_names(inputs: Sequence[str], targets: Sequence[str]) -> None:
    """ConfigError if `inputs` (data.variables) or `targets` (data.targets) hold a name that is not allowed there."""
    for key, names in (("data.variables", inputs), ("data.targets", targets)):
        for name in names:
            if name not in VARIABLES:
                near = difflib.get_close_matches(name, VARIABLES, n=1, cutoff=0.4)
                hint = f" (nearest: {near[0]})" if near else ""
                raise ConfigError(f"{key}: {name!r} is not a variable{hint}: expected one of {', '.join(VARIABLES)}")
    if "available" in inputs:
        raise ConfigError("data.variables: 'available' cannot be listed here: set data.availability=true to add it")
    for name in targets:
        if VARIABLES[name].kind != "dynamic":
            raise ConfigError(
                f"data.targets: {name!r} is {VARIABLES[name].kind}: expected variables that change in time"
            )


# Symbol -> (dimension, factor to its base unit, offset to it); only what occurs in air quality files.
_UNITS = {
    "kg": ("mass", 1e3, 0.0),
    "g": ("mass", 1.0, 0.0),
    "mg": ("mass", 1e-3, 0.0),
    "ug": ("mass", 1e-6, 0.0),
    "ng": ("mass", 1e-9, 0.0),
    "km": ("length", 1e3, 0.0),
    "m": ("length", 1.0, 0.0),
    "cm": ("length", 1e-2, 0.0),
    "h": ("time", 3600.0, 0.0),
    "s": ("time", 1.0, 0.0),
    "Pa": ("pressure", 1.0, 0.0),
    "hPa": ("pressure", 1e2, 0.0),
    "kPa": ("pressure", 1e3, 0.0),
    "K": ("temperature", 1.0, 0.0),
    "degC": ("temperature", 1.0, 273.15),
    "%": ("", 1e-2, 0.0),
    "1": ("", 1.0, 0.0),
    "degrees_north": ("latitude", 1.0, 0.0),
    "degrees_east": ("longitude", 1.0, 0.0),
}

_SYNONYMS = {
    "kg": "kilogram kilograms",
    "g": "gram grams",
    "mg": "milligram milligrams",
    "ug": "microgram micrograms mcg",
    "ng": "nanogram nanograms",
    "km": "kilometer kilometers kilometre kilometres",
    "m": "meter meters metre metres",
    "h": "hr hour hours",
    "s": "sec second seconds",
    "Pa": "pascal pascals",
    "hPa": "hectopascal hectopascals mbar mb millibar millibars",
    "kPa": "kilopascal kilopascals",
    "K": "kelvin degK deg_K degrees_kelvin",
    "degC": "\u00b0C celsius deg_C degree_C degrees_C degree_celsius degrees_celsius C",
    "%": "percent per_cent pct",
    "1": "people persons person inhabitants count cell dimensionless",
    "degrees_north": "degree_north degree_N degrees_N",
    "degrees_east": "degree_east degree_E degrees_E",
}
_SYMBOL_OF = {symbol: symbol for symbol in _UNITS} | {
    word: symbol for symbol, words in _SYNONYMS.items() for word in words.split()
}
_LONG_WORDS = {word.lower(): symbol for word, symbol in _SYMBOL_OF.items() if len(word) > 3}
_FACTOR = re.compile(r"(?P<word>[A-Za-z_%\u00b0]+)(?P<power>[+-]?\d+)?|(?P<number>\d+(\.\d*)?(e[+-]?\d+)?)")


@dataclass(frozen=True)
class _Unit:
    """powers: of each dimension, 0 left out; a value times `factor` plus `offset` is in the dimensions' base units."""

    powers: dict[str, int]
    factor: float
    offset: float


def _parse_unit(text: str) -> _Unit | None:
    """The unit that `text` spells; None if it is not understood. Symbols are told by case (Pa, hPa), words are not."""
    # NFKC turns superscripts into digits and the micro sign into a Greek mu; U+2212 is the minus sign
    text = unicodedata.normalize("NFKC", text).replace("\u03bc", "u").replace("\u2212", "-")
    text = re.sub(r"\bcubic (\w+)", r"\1 3", text, flags=re.IGNORECASE)
    text = re.sub(r"\bper\b", "/", text, flags=re.IGNORECASE).replace("**", "").replace("^", "")
    text = re.sub(r"(?<=[A-Za-z]) +(?=[+-]?\d+\b)", "", text)  # a power that stands apart from its symbol
    text = re.sub(r"(?<=\D)[.*]|[.*](?=\D)", " ", text)  # products, but not the point of a number
    powers: dict[str, int] = {}
    factor, offset = 1.0, 0.0
    for sign, words in zip(itertools.chain([1], itertools.repeat(-1)), text.split("/"), strict=False):
        for word in words.split() or [""]:
            match = _FACTOR.fullmatch(word)
            if match is None:
                return None
            if match["number"] is not None:
                factor *= float(match["number"]) ** sign
                continue
            symbol = _SYMBOL_OF.get(match["word"]) or _LONG_WORDS.get(match["word"].lower())
            if symbol is None:
                return None
            dimension, unit_factor, unit_offset = _UNITS[symbol]
            power = sign * int(match["power"] or 1)
            factor, offset = factor * unit_factor**power, offset + unit_offset
            powers[dimension] = powers.get(dimension, 0) + power
    return _Unit({dimension: power for dimension, power in powers.items() if dimension and power}, factor, offset)


def unit_conversion(unit: str, target: str) -> tuple[float, float]:
    """(scale, offset) such that a value in `unit` times scale plus offset is the value in `target`.

    Understands the usual spellings of concentrations, lengths, speeds, pressures, temperatures and fractions, as in
    "ug/m3", "ug m-3", "micrograms per cubic metre", "1e-9 kg m-3", "degC", "hPa". Raises DataError if either is not
    understood or the two measure different things.
    """
    parsed, wanted = _parse_unit(unit), _parse_unit(target)
    if parsed is None or wanted is None:
        raise DataError(
            f"unit {(unit if parsed is None else target)!r} is not understood: expected one like 'ug m-3', 'K'"
        )
    if parsed.powers != wanted.powers:
        raise DataError(f"unit {unit!r} cannot be converted to {target!r}")
    # twelve digits: what the products of powers of ten are meant to be
    return float(f"{parsed.factor / wanted.factor:.12g}"), (parsed.offset - wanted.offset) / wanted.factor


def same_unit(a: str, b: str) -> bool:
    """Whether `a` and `b` spell the same unit ("ug/m3" and "ug m-3"). False if one is not understood."""
    parsed, wanted = _parse_unit(a), _parse_unit(b)
    if parsed is None or wanted is None:
        return a == b
    return parsed.powers == wanted.powers and unit_conversion(a, b) == (1.0, 0.0)
