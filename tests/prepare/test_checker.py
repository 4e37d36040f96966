"""Values that cannot be: each kind is a decision with the rule that settles it, and the rule settles it."""

import json
from pathlib import Path

import numpy as np
import pytest

from topoflow.tools.prepare.checker import Checker
from topoflow.tools.prepare.findings import Finding, Findings
from topoflow.tools.prepare.recipe import Rules
from topoflow.tools.prepare.rules import parse_drops

TIMES = np.datetime64("2019-01-01T01") + np.arange(30) * np.timedelta64(1, "h")
PATH = Path("x.nc")
UNITS = {
    "pm25": "ug m-3",
    "co": "ug m-3",
    "temp": "K",
    "rh": "%",
    "psfc": "Pa",
    "u": "m s-1",
    "aod550": "1",
    "emission": "kg",
}
IDENTITY = (1.0, 0.0)


def values_of(low: float, high: float) -> np.ndarray:
    """[30, 5, 6] between low and high, each different."""
    return np.linspace(low, high, 900, dtype=np.float32).reshape(30, 5, 6)


def check(name: str, values: np.ndarray, of_raw=IDENTITY, **rules) -> tuple[np.ndarray, list[Finding], Checker]:
    findings = Findings()
    checker = Checker(Rules(**rules), findings, UNITS)
    half = len(values) // 2
    parts = [checker.check(name, values[p], TIMES[p], PATH, of_raw) for p in (slice(half), slice(half, None))]
    is_decided = checker.is_decided()
    checker.report()
    assert is_decided or findings.open()
    return np.concatenate(parts), findings.open(), checker


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("pm25", -30, 900),
        ("co", 50, 30000),
        ("temp", 200, 325),
        ("rh", 3, 104),
        ("psfc", 50000, 105000),
        ("u", -40, 40),
    ],
)
def test_values_of_the_atmosphere(name, low, high):
    values = values_of(low, high)
    values[3, 2, 1] = np.nan
    found, findings, _ = check(name, values)
    assert findings == []
    np.testing.assert_array_equal(found, values)


def test_a_limit_that_float32_cannot_hold_is_possible():
    values = values_of(0, 4)
    values[0, 0, 0] = -0.1  # in float32 a little less than the limit of aod550
    assert float(values.min()) < -0.1
    assert check("aod550", values)[1] == []


@pytest.mark.parametrize("mark", [-999.0, 9.96921e36, -32768.0, 1e20])
def test_a_mark_of_missing_values(mark):
    values = values_of(1, 300)
    values[:, :2, :2] = mark
    _, [finding], _ = check("pm25", values)
    assert "occurs 120 times" in finding.found
    rule = finding.settle.split('"')[1]
    found, findings, checker = check("pm25", values, drop=(rule,))
    assert findings == []
    np.testing.assert_array_equal(np.isnan(found), values == np.float32(mark))
    days = {str(day): checker.dropped(day) for day in np.unique(TIMES.astype("datetime64[D]"))}
    assert sum(sum(counts.values()) for counts in days.values()) == 120
    assert days["2019-01-01"] == {f"pm25: {mark:g}".replace(": ", ": pm25 == "): 23 * 4}


def test_marks_and_outliers_are_all_found_at_once():
    values = values_of(1, 300)
    values[:, 0, 0], values[:, 0, 1], values[0, 1, :3], values[1, 1, 0] = -999, 99999, [20000, 30000, 40000], -700
    _, findings, _ = check("pm25", values)
    rules = tuple(finding.settle.split('"')[1] for finding in findings)
    assert set(rules) == {"pm25 == -999", "pm25 == 99999", "pm25 > 10000", "pm25 < -50"}
    assert {"3 values that cannot be", "1 values that cannot be"} <= {f.found.split(",")[0] for f in findings}
    found, findings, _ = check("pm25", values, drop=rules)
    assert findings == []
    assert np.isnan(found).sum() == 64


def test_infinite_values():
    values = values_of(1, 300)
    values[4, 0, 0] = np.inf
    _, [finding], _ = check("emission", values)
    assert "infinite" in finding.found
    found, findings, _ = check("emission", values, drop=(finding.settle.split('"')[1],))
    assert findings == []
    assert np.isnan(found[4, 0, 0])


def test_equal_to_the_number_in_the_file():
    """CO in mg m-3: -999 in the file is -999000 here."""
    values = values_of(100, 2000)
    values[5] = -999000
    found, findings, _ = check("co", values, of_raw=(1000.0, 0.0), drop=("any == -999",))
    assert findings == []
    assert np.isnan(found).sum() == 30


@pytest.mark.parametrize(
    ("name", "low", "high", "unit"),
    [("pm25", 1e-9, 3e-7, "kg m-3"), ("co", 0.2, 4, "mg m-3"), ("temp", -20, 35, "degC"), ("temp", 10, 95, "degF"),
     ("psfc", 700, 1030, "hPa"), ("rh", 0.1, 0.98, "1")],
)  # fmt: skip
def test_another_unit_than_stated(name, low, high, unit):
    _, [finding], _ = check(name, values_of(low, high))
    assert finding.settle == f'units: {{{name}: "{unit}"}}'


def test_another_unit_is_that_of_the_file():
    """psfc stated in hPa and held in Pa."""
    _, [finding], _ = check("psfc", values_of(9e6, 1.02e7), of_raw=(100.0, 0.0))
    assert finding.settle == 'units: {psfc: "Pa"}'


def test_all_missing_or_zero_is_no_finding():
    assert check("pm25", np.full((30, 5, 6), np.nan))[1] == []
    assert check("pm25", np.zeros((30, 5, 6)))[1] == []


def test_constant_hours():
    values = values_of(1, 300)
    values[7], values[20] = 12.0, 13.0
    _, [finding], _ = check("pm25", values)
    assert finding.found.startswith("2 hours have one value everywhere")
    found, findings, _ = check("pm25", values, constant="drop")
    assert findings == []
    assert np.isnan(found[[7, 20]]).all()
    assert np.isnan(found).sum() == 60
    assert check("pm25", values, constant="keep")[1] == []


def test_rules_that_cannot_be_read():
    findings = Findings()
    assert parse_drops(("pm25", "pm25 = 3", "o3 > 1", "pm25 > --"), ("pm25",), findings) == ()
    assert [finding.severity for finding in findings.sorted()] == ["error"] * 4
    drops = parse_drops(("pm25 >= 5e3", "any == -9.99e+36"), ("pm25",), findings)
    assert [(drop.name, drop.comparison, drop.number) for drop in drops] == [
        ("pm25", ">=", 5000.0), ("any", "==", -9.99e36),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["mark", "constant fields"])
def test_what_an_interrupted_process_saw_counts_for_the_decision(kind):
    """Neither half is suspect by itself: too few marks, and fields that all have one value."""
    values = values_of(3, 90)
    if kind == "mark":
        values[[2, 8, 20, 26], :2, :2] = 999
        values[14:16, 0, 0] = 999
    else:
        values[:15] = 7
    expected = {finding.settle for finding in check("pm25", values)[1]}
    assert len(expected) == 1
    first, second = Checker(Rules(), Findings(), UNITS), Checker(Rules(), findings := Findings(), UNITS)
    first.check("pm25", values[:15], TIMES[:15], PATH, IDENTITY)
    second.recall(json.loads(json.dumps(first.seen())))
    second.check("pm25", values[15:], TIMES[15:], PATH, IDENTITY)
    second.report()
    assert {finding.settle for finding in findings.open()} == expected
    assert not first.seen()[0]


def test_marks_of_all_files_count_together():
    """Nine in each of two files."""
    values = values_of(300, 900)
    findings = Findings()
    checker = Checker(Rules(), findings, UNITS)
    for path, half in ((Path("a.nc"), slice(0, 15)), (Path("b.nc"), slice(15, 30))):
        part = values[half].copy()
        part[:9, 0, 0] = 9999
        checker.check("co", part, TIMES[half], path, IDENTITY)
    checker.report()
    [found] = findings.open()
    assert (found.file, "9999 occurs 18 times" in found.found) == ("a.nc", True)
