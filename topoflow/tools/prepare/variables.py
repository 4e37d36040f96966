"""Which variables a file has for us, how its values become ours, and which values cannot be."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

from topoflow.data.variables import VARIABLES
from topoflow.errors import DataError
from topoflow.tools.prepare.findings import Findings
from topoflow.tools.prepare.names import AUXILIARY, KNOWN, find_names
from topoflow.tools.prepare.recipe import Rules, Source
from topoflow.tools.prepare.rules import Drop, parse_drops
from topoflow.tools.prepare.units import conversion, is_convertible

GAS_CONSTANT = 8.314462618
"""J/(mol K), CODATA 2018."""
DRY_AIR_MOLAR_MASS = 28.9647
"""g/mol, US Standard Atmosphere 1976."""
PRESSURE_PA = 101325.0
_KELVIN = {"20 degC": 293.15, "25 degC": 298.15}
_GRAVITY = 9.80665
_COORDINATES = ("lat", "lon", "time", "station", "value", "parameter", "unit", "date", "hour")


@dataclass(frozen=True)
class Reader:
    """How a variable of ours is made of those of a file.

    needs: names in the file. unit: ours. convert: {name in the file: values} -> float32 in our unit, of the same shape.
    text: in words, for the report.
    """

    name: str
    needs: tuple[str, ...]
    unit: str
    convert: Callable[[Mapping[str, np.ndarray]], np.ndarray]
    text: str


def describe(dataset: xr.Dataset, source: Source, findings: Findings, file: str) -> dict[str, Reader]:
    """Return {our name: reader} of all variables that the file has; a finding for each that cannot be used."""
    return _Description(dataset, source, findings, file).readers()


class _Description:
    def __init__(self, dataset: xr.Dataset, source: Source, findings: Findings, file: str):
        self.dataset, self.source, self.findings, self.file = dataset, source, findings, file
        given = {ours: theirs for ours, theirs in source.names.items() if ours not in _COORDINATES}
        self.found = find_names(dataset, given, self._fits)

    def readers(self) -> dict[str, Reader]:
        readers = {}
        for ours, names in self.found.items():
            if ours in AUXILIARY:
                continue
            if len(names) > 1:
                found = f"{', '.join(names)} could all be {ours}"
                self.findings.add("decision", self.file, ours, found, "one", f"names: {{{ours}: {names[0]}}}")
                continue
            reader = self._reader(ours, names[0])
            if reader is not None:
                readers[ours] = reader
        for reader in self._derived():
            if reader is not None and reader.name not in self.found:
                readers[reader.name] = reader
        return readers

    def _unit(self, ours: str, theirs: str) -> str | None:
        """The unit of the file, or the recipe's; None where there is none, or it is empty."""
        if ours in self.source.units:
            return self.source.units[ours]
        attributes = self.dataset[theirs].attrs
        return str(attributes["units"]).strip() if str(attributes.get("units", "")).strip() else None

    def _fits(self, ours: str, theirs: str) -> bool:
        unit, wanted = self._unit(ours, theirs), KNOWN[ours].unit
        if unit is None or self.dataset[theirs].dtype.kind not in "iufb":
            return True
        return is_convertible(unit, wanted) or (KNOWN[ours].is_concentration and _is_ratio(unit)) or not _is_unit(unit)

    def _reader(self, ours: str, theirs: str) -> Reader | None:
        if self.dataset[theirs].dtype.kind not in "iufb":
            self.findings.add("error", self.file, theirs, f"type {self.dataset[theirs].dtype}", "numbers")
            return None
        unit = self._unit(ours, theirs)
        if ours not in KNOWN:
            return Reader(ours, (theirs,), unit or "1", lambda a: a[theirs].astype(np.float32), f"{theirs}")
        wanted = KNOWN[ours].unit
        if unit is None:
            line = f"units: {{{ours}: {wanted}}}"
            self.findings.add("decision", self.file, theirs, "no unit", f"one that converts to {wanted}", line)
            return None
        if KNOWN[ours].is_concentration and _is_ratio(unit):
            return self._ratio(ours, theirs, unit)
        linear = self._linear(ours, theirs)
        if linear is None:
            return None
        return Reader(ours, (theirs,), wanted, lambda a: linear(a[theirs]).astype(np.float32), f"{theirs} [{unit}]")

    def _linear(self, ours: str, theirs: str) -> Callable[[np.ndarray], np.ndarray] | None:
        """From the file's unit to ours, float64 inside; a finding where that is impossible."""
        unit, wanted = self._unit(ours, theirs), KNOWN[ours].unit
        try:
            factor, offset = conversion(unit or "", wanted)
        except DataError as error:
            line = f"units: {{{ours}: {wanted}}}"
            self.findings.add("decision", self.file, theirs, str(error), f"one that converts to {wanted}", line)
            return None
        if (factor, offset) == (1.0, 0.0):
            return lambda values: values
        return lambda values: values.astype(np.float64) * factor + offset

    def _ratio(self, ours: str, theirs: str, unit: str) -> Reader | None:
        """A mixing ratio (volume or mass) as ug m-3, by the ideal gas law."""
        known = KNOWN[ours]
        is_mass = _is_mass_ratio(unit)
        factor = conversion(unit, "kg kg-1" if is_mass else "1")[0]
        molar_mass = DRY_AIR_MOLAR_MASS if is_mass else known.molar_mass
        if molar_mass is None:
            self.findings.add("error", self.file, theirs, f"unit {unit!r} of particles", "a mass: ug m-3 or kg kg-1")
            return None
        scale = factor * molar_mass * 1e6 / GAS_CONSTANT  # ug K / (m3 Pa)
        if self.source.ratio != "file":
            kelvin = _KELVIN[self.source.ratio]
            constant = scale * PRESSURE_PA / kelvin
            text = f"{theirs} [{unit}] at {kelvin} K and 1013.25 hPa"
            convert = lambda a: (a[theirs].astype(np.float64) * constant).astype(np.float32)  # noqa: E731
            return Reader(ours, (theirs,), known.unit, convert, text)
        air = [self._one(name) for name in ("temp", "psfc")]
        linears = [self._linear(name, theirs) for name, theirs in zip(("temp", "psfc"), air, strict=True) if theirs]
        temp, psfc = air
        if temp is None or psfc is None or None in linears:
            found = f"unit {unit!r} is a mixing ratio, and the file has no temperature and pressure"
            self.findings.add("decision", self.file, theirs, found, "conditions (293.15 K: EU, 298.15 K: US EPA)",
                              "ratio: 20 degC (or 25 degC), in this source")  # fmt: skip
            return None
        kelvin_of, pascal_of = linears

        def convert_with_air(a: Mapping[str, np.ndarray]) -> np.ndarray:
            assert kelvin_of is not None
            assert pascal_of is not None
            density = pascal_of(a[psfc].astype(np.float64)) / kelvin_of(a[temp].astype(np.float64))
            return (a[theirs].astype(np.float64) * density * scale).astype(np.float32)

        return Reader(ours, (theirs, temp, psfc), known.unit, convert_with_air, f"{theirs} [{unit}], {temp}, {psfc}")

    def _one(self, ours: str) -> str | None:
        names = self.found.get(ours, [])
        return names[0] if len(names) == 1 else None

    def _derived(self) -> list[Reader | None]:
        return [*self._wind(), self._humidity(), self._height()]

    def _wind(self) -> list[Reader | None]:
        speed, direction = self._one("wind_speed"), self._one("wind_direction")
        if speed is None or direction is None:
            return []
        fast, turned = self._linear("wind_speed", speed), self._linear("wind_direction", direction)
        if fast is None or turned is None:
            return []

        def component(function: Callable[[np.ndarray], np.ndarray]):
            # the direction is the one that the wind comes from
            return lambda a: (
                -fast(a[speed].astype(np.float64)) * function(np.deg2rad(turned(a[direction].astype(np.float64))))
            ).astype(np.float32)

        text = f"{speed}, {direction}"
        needs = (speed, direction)
        return [
            Reader("u", needs, "m s-1", component(np.sin), text),
            Reader("v", needs, "m s-1", component(np.cos), text),
        ]

    def _humidity(self) -> Reader | None:
        temp, dew = self._one("temp"), self._one("dew_point")
        if temp is None or dew is None:
            return None
        kelvin, dew_kelvin = self._linear("temp", temp), self._linear("dew_point", dew)
        if kelvin is None or dew_kelvin is None:
            return None

        def humidity(a: Mapping[str, np.ndarray]) -> np.ndarray:
            pressure = [_vapour_pressure(f(a[n].astype(np.float64))) for f, n in ((dew_kelvin, dew), (kelvin, temp))]
            return (100 * pressure[0] / pressure[1]).astype(np.float32)

        return Reader("rh", (temp, dew), "%", humidity, f"{temp}, {dew}")

    def _height(self) -> Reader | None:
        name = self._one("geopotential")
        if name is None:
            return None
        linear = self._linear("geopotential", name)
        if linear is None:
            return None
        return Reader(
            "elevation", (name,), "m", lambda a: (linear(a[name]) / _GRAVITY).astype(np.float32), f"{name} / g"
        )


def _vapour_pressure(kelvin: np.ndarray) -> np.ndarray:
    """Saturation over water, Pa (Bolton 1980, equation 10)."""
    celsius = kelvin - 273.15
    return 611.2 * np.exp(17.67 * celsius / (celsius + 243.5))


def _is_unit(unit: str) -> bool:
    try:
        conversion(unit, unit)
    except DataError:
        return False
    return True


def _is_ratio(unit: str) -> bool:
    return is_convertible(unit, "1") or is_convertible(unit, "mol mol-1")


def _is_mass_ratio(unit: str) -> bool:
    return "kg" in unit or "/g" in unit


class Checker:
    """Find values that cannot be, and drop those that the recipe names; counts by day.

    rules.drop is applied first. What then lies outside the possible range of its variable is a decision. Small
    negative concentrations are noise of the instrument, and stay.
    """

    def __init__(self, rules: Rules, findings: Findings, units: Mapping[str, str]):
        self._findings, self._units = findings, units
        self._drops: tuple[Drop, ...] = parse_drops(rules.drop, tuple(units), findings)
        self._constant = rules.constant
        self._dropped: dict[np.datetime64, Counter[str]] = {}
        self._outside: dict[tuple[str, str], Counter[float]] = {}
        self._largest: dict[tuple[str, str], float] = {}

    def check(self, name: str, values: np.ndarray, times: np.ndarray, path: Path) -> np.ndarray:
        """Return float32 values [n, ...] of variable `name` at `times` [n] without those that are dropped."""
        values = values.astype(np.float32, copy=True)
        days = times.astype("datetime64[D]")
        for drop in self._drops:
            if drop.concerns(name):
                self._drop(name, values, drop.finds(values), str(drop), days)
        known = KNOWN.get(name)
        with np.errstate(invalid="ignore"):
            outside = np.isinf(values)
            if known is not None:
                outside |= (values < known.low) | (values > known.high)
        if outside.any():
            counter = self._outside.setdefault((name, str(path)), Counter())
            found, counts = np.unique(values[outside], return_counts=True)
            if len(counter) < 1000:
                counter.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))
        if known is not None and known.is_concentration:
            top = np.nanmax(values) if np.isfinite(values).any() else np.nan
            if np.isfinite(top):
                key = (name, str(path))
                self._largest[key] = max(float(top), self._largest.get(key, -np.inf))
        if name in VARIABLES and self._constant != "keep" and values.ndim == 3:
            self._check_constant(name, values, days, path)
        return values

    def _check_constant(self, name: str, values: np.ndarray, days: np.ndarray, path: Path) -> None:
        """Whole fields of one value among others that vary."""
        flat = values.reshape(len(values), -1)
        if flat.shape[1] < 16:
            return
        present = np.isfinite(flat).sum(axis=1)
        with np.errstate(invalid="ignore"):
            high = np.where(np.isnan(flat), -np.inf, flat).max(axis=1)
            low = np.where(np.isnan(flat), np.inf, flat).min(axis=1)
        constant = (present >= 16) & (high == low)
        if not constant.any() or constant.all():
            return
        if self._constant == "drop":
            self._drop(name, values, np.broadcast_to(constant[:, None, None], values.shape), "constant field", days)
            return
        found = f"{constant.sum()} hours have one value everywhere, such as {high[constant][0]:g}"
        line = "rules: {constant: drop}"
        self._findings.add("decision", path, name, found, "fields that vary", line)

    def _drop(self, name: str, values: np.ndarray, found: np.ndarray, reason: str, days: np.ndarray) -> None:
        if not found.any():
            return
        per_time = found.reshape(len(found), -1).sum(axis=1)
        values[found] = np.nan
        for day in np.unique(days):
            count = int(per_time[days == day].sum())
            if count:
                self._dropped.setdefault(day, Counter())[f"{name}: {reason}"] += count

    def dropped(self, day: np.datetime64) -> dict[str, int]:
        """Return and forget what was dropped on a day: {variable and rule: count}."""
        return dict(self._dropped.pop(day, Counter()))

    def is_decided(self) -> bool:
        """Return whether no value was found that cannot be."""
        return not self._outside

    def report(self) -> None:
        """Add a finding for each variable and file with values that cannot be."""
        for (name, path), counter in self._outside.items():
            known, unit = KNOWN.get(name), self._units.get(name, "")
            expected = f"{known.low:g} to {known.high:g} {known.unit}" if known else "finite numbers"
            (value, count), total = counter.most_common(1)[0], sum(counter.values())
            extreme = max(counter, key=abs)
            if count > 1 and count >= 0.5 * total:
                found = f"{value:.6g} {unit} occurs {count} times: a mark of missing values that no attribute states?"
                line = f'rules: {{drop: ["{name} == {value:.6g}"]}}'
            else:
                sign, limit = (">", known.high) if known and extreme > known.high else ("<", known.low if known else 0)
                found = f"{total} values that cannot be, such as {extreme:.6g} {unit}"
                line = f'rules: {{drop: ["{name} {sign} {limit:g}"]}}'
            self._findings.add("decision", path, name, found, expected, line)
        for (name, path), top in self._largest.items():
            if 0 < top < 1e-4:
                found = f"largest value {top:.3g} ug m-3, which would be plausible in kg m-3"
                line = f"units: {{{name}: kg m-3}}"
                self._findings.add("decision", path, name, found, "concentrations of about 1 to 1000 ug m-3", line)
        self._outside.clear()
        self._largest.clear()
