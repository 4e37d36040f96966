"""Values that cannot be: found, counted, and dropped where the recipe says so."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from topoflow.data.variables import VARIABLES
from topoflow.tools.prepare.findings import Findings
from topoflow.tools.prepare.marks import Extreme
from topoflow.tools.prepare.names import KNOWN, Known
from topoflow.tools.prepare.recipe import Rules
from topoflow.tools.prepare.rules import Drop, parse_drops
from topoflow.tools.prepare.units import conversion

_MOST_VALUES = 1000
_MARK_COUNT = 10
_CONSTANT_CELLS = 16
_FLOAT_RANGE = (float(np.finfo(np.float32).min), float(np.finfo(np.float32).max))


@dataclass
class _Seen:
    """What one variable of one file held, after what is dropped.

    below, above: counts of values outside the possible range. low, high: of finite values; lowest, highest: of all.
    outside: counts of the first different values outside the range.
    """

    of_raw: tuple[float, float] | None
    count: int = 0
    below: int = 0
    above: int = 0
    low: float = np.inf
    high: float = -np.inf
    lowest: float = np.inf
    highest: float = -np.inf
    outside: Counter[float] = field(default_factory=Counter)
    constant_hours: int = 0
    constant: float = 0.0


class Checker:
    """Find values that cannot be, and drop those that the recipe names; counts by day.

    rules.drop is applied first. What then lies outside the possible range of its variable, is infinite, or has the size
    of another unit is a decision, and so is a possible value that looks like a mark of missing values. Small negative
    concentrations are noise of the instrument, and stay. None of this is about the values of rules.keep.
    """

    def __init__(self, rules: Rules, findings: Findings, units: Mapping[str, str]):
        self._findings, self._units = findings, units
        self._drops: tuple[Drop, ...] = parse_drops(rules.drop, tuple(units), findings)
        self._keeps: tuple[Drop, ...] = parse_drops(rules.keep, tuple(units), findings, "keep")
        self._constant = rules.constant
        self._hours: Counter[str] = Counter()
        self._constant_hours: Counter[str] = Counter()
        self._extremes: dict[tuple[str, int, tuple[float, float]], Extreme] = {}
        self._dropped: dict[np.datetime64, Counter[str]] = {}
        self._seen: dict[tuple[str, str], _Seen] = {}
        self._looked_at: dict[tuple[str, str], None] = {}

    def check(
        self, name: str, values: np.ndarray, times: np.ndarray, path: Path, of_raw: tuple[float, float] | None = None
    ) -> np.ndarray:
        """Return float32 values of variable `name` without those that are dropped.

        Args:
            name: ours.
            values: [n, ...] in our unit.
            times: [n], datetime64.
            path: names the file in findings.
            of_raw: the reader's; with it a rule `== number` is also about the number in the file.
        """
        values = values.astype(np.float32, copy=True)
        days = times.astype("datetime64[D]")
        for drop in self._drops:
            if drop.concerns(name):
                self._drop(name, values, drop.finds(values, of_raw), str(drop), days)
        seen = self._seen.setdefault((name, str(path)), _Seen(of_raw))
        if name in VARIABLES and self._constant != "keep" and values.ndim == 3:
            self._check_constant(name, values, days, seen)
        looked = values
        for keep in self._keeps:
            if keep.concerns(name):
                looked = np.where(keep.finds(values, of_raw), np.float32(np.nan), looked)
        self._look(name, looked, str(path), seen)
        self._looked_at[name, str(path)] = None
        return values

    def _look(self, name: str, values: np.ndarray, path: str, seen: _Seen) -> None:
        if not values.size:
            return
        known = KNOWN.get(name)
        least, most = (known.low, known.high) if known is not None else _FLOAT_RANGE
        low, high = float(np.fmin.reduce(values, axis=None)), float(np.fmax.reduce(values, axis=None))  # without NaN
        seen.count += values.size - int(np.count_nonzero(np.isnan(values)))
        if least <= low and high <= most:
            seen.low, seen.high = min(seen.low, low), max(seen.high, high)
        elif low <= high:
            self._look_outside(least, most, values, seen)
            values = np.where((values >= least) & (values <= most), values, np.float32(np.nan))
            low, high = float(np.fmin.reduce(values, axis=None)), float(np.fmax.reduce(values, axis=None))
        if known is not None and seen.of_raw is not None and low <= high:
            for sign, top in ((1, high), (-1, -low)):
                self._extremes.setdefault((name, sign, seen.of_raw), Extreme()).add(top, values, sign, path)

    def _look_outside(self, least: float, most: float, values: np.ndarray, seen: _Seen) -> None:
        present = values[~np.isnan(values)]
        finite = present[np.isfinite(present)]
        if finite.size:
            seen.low, seen.high = min(seen.low, float(finite.min())), max(seen.high, float(finite.max()))
        below, above = present < least, present > most
        outside = present[below | above]
        if not outside.size:  # float32 rounds the limit to the value
            return
        seen.below, seen.above = seen.below + int(below.sum()), seen.above + int(above.sum())
        seen.lowest, seen.highest = min(seen.lowest, float(outside.min())), max(seen.highest, float(outside.max()))
        found, counts = np.unique(outside, return_counts=True)
        for value, count in zip(found.tolist(), counts.tolist(), strict=True):
            if value in seen.outside or len(seen.outside) < _MOST_VALUES:
                seen.outside[value] += count

    def _check_constant(self, name: str, values: np.ndarray, days: np.ndarray, seen: _Seen) -> None:
        """Whole fields of one value: a finding where others, of any file, vary."""
        flat = values.reshape(len(values), -1)
        low, high = np.fmin.reduce(flat, axis=1), np.fmax.reduce(flat, axis=1)  # of what is not NaN
        constant = high == low
        if constant.any():
            constant &= np.isfinite(flat).sum(axis=1) >= _CONSTANT_CELLS
        self._hours[name] += int(np.count_nonzero(high >= low))
        if not constant.any():
            return
        if self._constant == "drop":
            found = np.broadcast_to(constant[:, None, None], values.shape) & ~np.isnan(values)
            self._drop(name, values, found, "constant field", days)
            return
        self._constant_hours[name] += int(constant.sum())
        seen.constant_hours += int(constant.sum())
        seen.constant = float(high[constant][0])

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
        is_open = any(seen.below or seen.above for seen in self._seen.values())
        return not is_open and not any(map(self._is_sometimes_constant, self._hours))

    def _is_sometimes_constant(self, name: str) -> bool:
        """Return whether some fields of a variable have one value everywhere, and others vary."""
        return 0 < self._constant_hours[name] < self._hours[name]

    def seen(self) -> list[Any]:
        """Return, as plain values, what is known of the values of the files looked at since the last call."""
        keys, self._looked_at = list(self._looked_at), {}
        found = [(key, self._seen[key]) for key in keys if self._seen[key].high >= self._seen[key].low]
        files = [[*key, seen.of_raw, seen.count, seen.low, seen.high, seen.constant_hours] for key, seen in found]
        names = {name for name, _ in keys}
        fields = [[name, self._hours[name], self._constant_hours[name]] for name in sorted(names)]
        extremes = [[*key, *vars(extreme).values()] for key, extreme in self._extremes.items() if key[0] in names]
        return [files, fields, extremes]

    def recall(self, seen: list[Any]) -> None:
        """Take up what `seen` returned in an earlier process, about values that could be."""
        files, fields, extremes = seen
        for name, path, of_raw, count, low, high, constant_hours in files:
            known = self._seen.setdefault((name, path), _Seen(None if of_raw is None else (of_raw[0], of_raw[1])))
            known.count, known.low, known.high = max(known.count, count), min(known.low, low), max(known.high, high)
            known.constant_hours = max(known.constant_hours, constant_hours)
        for name, hours, constant in fields:
            self._hours[name] = max(self._hours[name], hours)
            self._constant_hours[name] = max(self._constant_hours[name], constant)
        for name, sign, (factor, offset), *values in extremes:
            self._extremes.setdefault((name, sign, (factor, offset)), Extreme()).merge(*values)

    def report(self) -> None:
        """Add the findings about all values since the last report."""
        for (name, path), seen in self._seen.items():
            known = KNOWN.get(name)
            if seen.constant_hours and self._is_sometimes_constant(name):
                found = f"{seen.constant_hours} hours have one value everywhere, such as {seen.constant:g}"
                self._findings.add("decision", path, name, found, "fields that vary", "rules: {constant: drop}")
            if known is None or not self._report_unit(name, path, known, seen):
                self._report_outside(name, path, known, seen)
        for (name, sign, of_raw), extreme in self._extremes.items():
            self._report_mark(name, sign, of_raw, extreme)
        for of_all in (self._seen, self._looked_at, self._hours, self._constant_hours, self._extremes):
            of_all.clear()

    def _report_mark(self, name: str, sign: int, of_raw: tuple[float, float], extreme: Extreme) -> None:
        """Add a decision where the largest value (sign 1) or smallest (-1) looks like a mark of missing values."""
        mark = extreme.find_mark(sign, of_raw, KNOWN[name].is_concentration)
        if mark is None:
            return
        found = f"{mark[0]:g} occurs {extreme.count} times, the next value is {mark[1]:.4g}"
        rule = f'["{name} == {mark[0]:g}"]'
        line = f"rules: {{drop: {rule}}}, or {{keep: {rule}}} if it is right"
        what = f"{found}: a mark of missing values?"
        self._findings.add("decision", extreme.path, name, what, "no such mark", line)

    def _report_unit(self, name: str, path: str, known: Known, seen: _Seen) -> bool:
        """Add a decision where all values would be possible in another unit, and are not in the stated one."""
        if not np.isfinite([seen.low, seen.high]).all() or seen.low == seen.high == 0:
            return False
        is_low = known.least_top is not None and seen.count > 1 and 0 < seen.high < known.least_top
        is_outside = seen.below + seen.above == seen.count > 0
        if seen.of_raw is None or not (is_low or is_outside):
            return False
        factor, offset = seen.of_raw
        raw = (np.array([seen.low, seen.high]) - offset) / factor
        for unit in (*known.other_units, known.unit):
            scale, shift = conversion(unit, known.unit)
            low, high = raw * scale + shift
            if known.low <= low and (known.least_top or -np.inf) <= high <= known.high:
                found = f"{raw[0]:.4g} to {raw[1]:.4g} in the file, which is possible in {unit} alone"
                expected, line = f"{known.low:g} to {known.high:g} {known.unit}", f'units: {{{name}: "{unit}"}}'
                self._findings.add("decision", path, name, found, expected, line)
                return True
        return False

    def _report_outside(self, name: str, path: str, known: Known | None, seen: _Seen) -> None:
        unit, outside = self._units.get(name, ""), seen.below + seen.above
        least, most = (known.low, known.high) if known is not None else _FLOAT_RANGE
        expected = f"{least:g} to {most:g} {known.unit}" if known is not None else "finite numbers"
        below, above = seen.below, seen.above
        for value, count in seen.outside.most_common(3):
            is_mark = count > 1 and (count >= _MARK_COUNT or 2 * count >= outside)
            if not is_mark or not np.isfinite(value):
                continue
            found = f"{value:.6g} {unit} occurs {count} times: a mark of missing values that no attribute states?"
            line = f'rules: {{drop: ["{name} == {value:.6g}"]}}'
            self._findings.add("decision", path, name, found, expected, line)
            below, above = (below - count, above) if value < least else (below, above - count)
        for count, extreme, rule in ((below, seen.lowest, f"< {least:g}"), (above, seen.highest, f"> {most:g}")):
            if count:
                found = f"{count} values that cannot be, such as {extreme:.6g} {unit}"
                if np.isinf(extreme):
                    found = f"{count} values that are infinite, or computed from values that cannot be"
                line = f'rules: {{drop: ["{name} {rule}"]}}'
                self._findings.add("decision", path, name, found, expected, line)
