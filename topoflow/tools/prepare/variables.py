"""Which variables a file has for us, and how its values become ours."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from topoflow.errors import DataError
from topoflow.tools.prepare import air
from topoflow.tools.prepare.findings import Findings
from topoflow.tools.prepare.names import AUXILIARY, KNOWN, find_names
from topoflow.tools.prepare.recipe import Source
from topoflow.tools.prepare.units import conversion, is_convertible

_KELVIN = {"20 degC": 293.15, "25 degC": 298.15}
_COORDINATES = ("lat", "lon", "time", "station", "value", "parameter", "unit", "date", "hour")
_MASS = re.compile(r"(?<![A-Za-z])(k|m|u|\u00b5|\u03bc|n|p)?g(?![A-Za-z])|gram", re.IGNORECASE)
_GRID_ANGLE = ("COSALPHA", "SINALPHA")
"""WRF's cosine and sine of the angle between its columns and north."""

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Reader:
    """How a variable of ours is made of those of a file.

    needs: names in the file. unit: ours. convert: {name in the file: values} -> float32 in our unit, of the same shape;
    infinite where a value is computed from one that cannot be. text: in words, for the report. of_raw: what a number in
    the file becomes in our unit, as factor and offset; None where it depends on other variables.
    """

    name: str
    needs: tuple[str, ...]
    unit: str
    convert: Callable[[Arrays], np.ndarray]
    text: str
    of_raw: tuple[float, float] | None = None


@dataclass(frozen=True)
class _Quantity:
    """One variable of the file in our unit: a value of the file times factor plus offset."""

    ours: str
    theirs: str
    factor: float
    offset: float

    def of(self, arrays: Arrays) -> np.ndarray:
        return arrays[self.theirs].astype(np.float64) * self.factor + self.offset

    def is_impossible(self, arrays: Arrays) -> np.ndarray:
        known, values = KNOWN[self.ours], self.of(arrays)
        return (values < known.low) | (values > known.high)


def describe(dataset: xr.Dataset, source: Source, findings: Findings, file: str) -> dict[str, Reader]:
    """Return {our name: reader} of all variables that the file has; a finding for each that cannot be used.

    Args:
        dataset: names as in the file, decoded.
        source: names, units and conditions that the recipe states.
        findings: gets what was found.
        file: names the file in findings.
    """
    return _Description(dataset, source, findings, file).readers()


class _Description:
    def __init__(self, dataset: xr.Dataset, source: Source, findings: Findings, file: str):
        self.dataset, self.source, self.findings, self.file = dataset, source, findings, file
        given = {ours: theirs for ours, theirs in source.names.items() if ours not in _COORDINATES}
        self.found, misfits = find_names(dataset, given, self._fits)
        for ours, theirs in given.items():
            if theirs not in dataset.variables:
                findings.add("note", file, theirs, f"not in this file, which the recipe expects as {ours}")
        for ours, theirs in misfits:
            found = f"unit {self._unit(ours, theirs)!r} cannot become {KNOWN[ours].unit}: left out"
            findings.add("note", file, theirs, found, settle=f"names: {{{ours}: {theirs}}}, with units")

    def readers(self) -> dict[str, Reader]:
        readers = {}
        for ours, names in self.found.items():
            if ours in AUXILIARY:
                continue
            if len(names) > 1:
                self._add_ambiguous(ours, names)
                continue
            reader = self._reader(ours, names[0])
            if reader is not None:
                readers[ours] = reader
        for reader in (*self._wind(), self._humidity(), self._height()):
            if reader is not None and reader.name not in self.found:
                readers[reader.name] = reader
        return readers | self._turned_wind(readers)

    def _add_ambiguous(self, ours: str, names: Sequence[str]) -> None:
        found = f"{', '.join(names)} could all be {ours}"
        self.findings.add("decision", self.file, ours, found, "one", f'names: {{{ours}: "{names[0]}"}}')

    def _unit(self, ours: str, theirs: str) -> str | None:
        """The unit of the file, or the recipe's; None where there is none, or it is empty."""
        if ours in self.source.units:
            return self.source.units[ours]
        return str(self.dataset[theirs].attrs.get("units", "")).strip() or None

    def _fits(self, ours: str, theirs: str) -> bool:
        unit, wanted = self._unit(ours, theirs), KNOWN[ours].unit
        if unit is None or not self._has_numbers(theirs) or not is_convertible(unit, unit):
            return True
        return is_convertible(unit, wanted) or (KNOWN[ours].is_concentration and is_convertible(unit, "1"))

    def _has_numbers(self, theirs: str) -> bool:
        return self.dataset[theirs].dtype.kind in "iuf"

    def _reader(self, ours: str, theirs: str) -> Reader | None:
        if not self._has_numbers(theirs):
            self.findings.add("error", self.file, theirs, f"type {self.dataset[theirs].dtype}", "numbers")
            return None
        unit = self._unit(ours, theirs)
        if ours not in KNOWN:
            return self._make(ours, (theirs,), unit or "1", lambda a: a[theirs], theirs, of_raw=(1.0, 0.0))
        if unit is not None and KNOWN[ours].is_concentration and is_convertible(unit, "1"):
            return self._ratio(ours, theirs, unit)
        quantity = self._quantity(ours)
        if quantity is None:
            return None
        if "25 c)" in (unit or "").lower():
            found = f"unit {unit!r} is at 25 degC and 1013.25 hPa: taken as it is"
            self.findings.add("note", self.file, theirs, found)
        factors = (quantity.factor, quantity.offset)
        convert = quantity.of if factors != (1.0, 0.0) else lambda a: a[theirs]
        return self._make(ours, (theirs,), KNOWN[ours].unit, convert, f"{theirs} [{unit}]", of_raw=factors)

    def _quantity(self, ours: str) -> _Quantity | None:
        """The one variable of the file that is `ours`; None without one, or, with a finding, without its unit."""
        names = self.found.get(ours, [])
        if len(names) > 1:
            self._add_ambiguous(ours, names)
        if len(names) != 1 or not self._has_numbers(names[0]):
            return None
        unit, wanted = self._unit(ours, names[0]), KNOWN[ours].unit
        try:
            if unit is None:
                raise DataError("no unit")
            factor, offset = conversion(unit, wanted)
        except DataError as error:
            line = f"units: {{{ours}: {wanted}}}"
            self.findings.add("decision", self.file, names[0], str(error), f"one that converts to {wanted}", line)
            return None
        return _Quantity(ours, names[0], factor, offset)

    def _ratio(self, ours: str, theirs: str, unit: str) -> Reader | None:
        """A mixing ratio (volume or mass) as ug m-3, by the ideal gas law."""
        known, standard_name = KNOWN[ours], str(self.dataset[theirs].attrs.get("standard_name", ""))
        is_mass = _MASS.search(unit) is not None or standard_name.startswith("mass_fraction")
        is_stated = is_mass or "mol" in unit.lower() or re.match(r"\W*(p|parts)", unit, re.IGNORECASE) is not None
        if not is_stated and not standard_name.startswith("mole_fraction"):
            found = f"unit {unit!r} does not say what is divided by what"
            line = f"units: {{{ours}: {known.unit}}}"
            self.findings.add("decision", self.file, theirs, found, "ug m-3, kg kg-1, mol mol-1 or ppb", line)
            return None
        molar_mass = air.DRY_AIR_MOLAR_MASS if is_mass else known.molar_mass
        if molar_mass is None:
            found = f"unit {unit!r} is a mixing ratio by volume, of particles"
            self.findings.add("decision", self.file, theirs, found, "a mass", f"units: {{{ours}: {known.unit}}}")
            return None
        factor = conversion(unit, "1")[0]
        if self.source.ratio != "file":
            kelvin = _KELVIN[self.source.ratio]
            scale = float(air.concentration(np.array(factor), molar_mass, kelvin, air.STANDARD_PRESSURE_PA))
            text = f"{theirs} [{unit}] at {kelvin} K and 1013.25 hPa"
            quantity = _Quantity(ours, theirs, scale, 0.0)
            return self._make(ours, (theirs,), known.unit, quantity.of, text, of_raw=(scale, 0.0))
        temp, psfc = self._quantity("temp"), self._quantity("psfc")
        if temp is None or psfc is None:
            found = f"unit {unit!r} is a mixing ratio, and this file has no temperature and pressure"
            expected = "conditions of the source: 20 degC (EU) or 25 degC (US EPA), 1013.25 hPa"
            self.findings.add("decision", self.file, theirs, found, expected, "ratio: 20 degC")
            return None

        def convert(a: Arrays) -> np.ndarray:
            return air.concentration(a[theirs].astype(np.float64) * factor, molar_mass, temp.of(a), psfc.of(a))

        needs, text = (theirs, temp.theirs, psfc.theirs), f"{theirs} [{unit}], {temp.theirs}, {psfc.theirs}"
        return self._make(ours, needs, known.unit, convert, text, (temp, psfc))

    def _wind(self) -> list[Reader]:
        if {"u", "v"} <= self.found.keys() or not {"wind_speed", "wind_direction"} <= self.found.keys():
            return []
        speed, direction = self._quantity("wind_speed"), self._quantity("wind_direction")
        if speed is None or direction is None:
            return []

        def component(i: int) -> Callable[[Arrays], np.ndarray]:
            return lambda a: air.wind_from_direction(speed.of(a), direction.of(a))[i]

        needs, text = (speed.theirs, direction.theirs), f"{speed.theirs}, {direction.theirs}"
        return [
            self._make(name, needs, "m s-1", component(i), text, (speed, direction))
            for i, name in enumerate(("u", "v"))
        ]

    def _turned_wind(self, readers: Mapping[str, Reader]) -> dict[str, Reader]:
        """WRF's wind along its rows and columns, as eastward and northward wind."""
        names = [self.found.get(ours, [""])[0] for ours in ("u", "v")]
        is_along_grid = names == ["U10", "V10"] and all(name in self.dataset.variables for name in _GRID_ANGLE)
        if not is_along_grid or not {"u", "v"} <= readers.keys():
            return {}
        needs, text = (*names, *_GRID_ANGLE), "U10, V10, turned by COSALPHA, SINALPHA"
        u, v = readers["u"].convert, readers["v"].convert
        cos, sin = _GRID_ANGLE
        return {
            "u": self._make("u", needs, "m s-1", lambda a: u(a) * a[cos] - v(a) * a[sin], text),
            "v": self._make("v", needs, "m s-1", lambda a: v(a) * a[cos] + u(a) * a[sin], text),
        }

    def _humidity(self) -> Reader | None:
        if "rh" in self.found or not any(
            name in self.found for name in ("dew_point", "specific_humidity", "vapour_ratio")
        ):
            return None
        temp, dew, psfc = (self._quantity(name) for name in ("temp", "dew_point", "psfc"))
        if temp is None:
            return None
        if dew is not None:
            needs = (temp.theirs, dew.theirs)
            convert = lambda a: air.humidity_from_dew_point(temp.of(a), dew.of(a))  # noqa: E731
            return self._make("rh", needs, "%", convert, ", ".join(needs), (temp, dew))
        vapour = self._quantity("specific_humidity") or self._quantity("vapour_ratio")
        if vapour is None or psfc is None:
            return None
        is_specific = vapour.ours == "specific_humidity"

        def from_vapour(a: Arrays) -> np.ndarray:
            ratio = vapour.of(a)
            return air.humidity_from_vapour_ratio(temp.of(a), psfc.of(a), ratio / (1 - ratio) if is_specific else ratio)

        needs = (temp.theirs, psfc.theirs, vapour.theirs)
        return self._make("rh", needs, "%", from_vapour, ", ".join(needs), (temp, psfc, vapour))

    def _height(self) -> Reader | None:
        if "elevation" in self.found or not self.found.get("geopotential"):
            return None
        height = self._quantity("geopotential")
        if height is None:
            return None
        text = f"{height.theirs} / {air.GRAVITY} m s-2"
        return self._make("elevation", (height.theirs,), "m", lambda a: height.of(a) / air.GRAVITY, text, (height,))

    def _make(
        self, name: str, needs: tuple[str, ...], unit: str, convert: Callable[[Arrays], np.ndarray], text: str,
        inputs: Sequence[_Quantity] = (), of_raw: tuple[float, float] | None = None,
    ) -> Reader:  # fmt: skip
        """A reader that leaves out what the file calls invalid; infinite where one of `inputs` cannot be."""
        valid = {need: limits for need in needs if (limits := self._valid(need)) is not None}

        def guarded(arrays: Arrays) -> np.ndarray:
            arrays = {need: _inside(arrays[need], valid.get(need)) for need in needs}
            with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
                values = convert(arrays)
                for quantity in inputs:
                    values = np.where(quantity.is_impossible(arrays), np.inf, values)
                return values.astype(np.float32)

        return Reader(name, needs, unit, guarded, text, of_raw)

    def _valid(self, theirs: str) -> tuple[float, float] | None:
        """What the file calls valid, unpacked, from valid_range or valid_min and valid_max (CF 2.5.1)."""
        attributes, encoding = self.dataset[theirs].attrs, self.dataset[theirs].encoding
        limits: list[Any] = [attributes.get("valid_min"), attributes.get("valid_max")]
        if "valid_range" in attributes and np.size(attributes["valid_range"]) == 2:
            limits = list(np.ravel(attributes["valid_range"]))
        if limits[0] is None and limits[1] is None:
            return None
        try:
            low, high = (
                bound if limit is None else self._unpacked(np.asarray(limit), encoding)
                for limit, bound in zip(limits, (-np.inf, np.inf), strict=True)
            )
        except (TypeError, ValueError):
            self.findings.add("note", self.file, theirs, f"valid range {limits} is no pair of numbers: not used")
            return None
        found = f"the file calls {low:g} to {high:g} valid: other values are read as missing"
        self.findings.add("note", self.file, theirs, found)
        return (low, high) if low <= high else (high, low)

    @staticmethod
    def _unpacked(limit: np.ndarray, encoding: Mapping[str, Any]) -> float:
        """A limit is packed like the values where it has their type (CF 2.5.1)."""
        stored = encoding.get("dtype")
        is_packed = "scale_factor" in encoding or "add_offset" in encoding
        if is_packed and stored is not None and np.dtype(stored).kind == limit.dtype.kind:
            return float(limit) * float(encoding.get("scale_factor", 1)) + float(encoding.get("add_offset", 0))
        return float(limit)


def _inside(values: np.ndarray, limits: tuple[float, float] | None) -> np.ndarray:
    if limits is None:
        return values
    values = values.astype(np.float64)
    margin = 1e-6 * max(abs(limit) for limit in limits if np.isfinite(limit))
    return np.where((values < limits[0] - margin) | (values > limits[1] + margin), np.nan, values)
