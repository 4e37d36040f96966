"""Clocks: whole hours in UTC whatever the file has, or a finding that names the stamp and the line that settles it."""

import datetime
import os
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from numpy.typing import ArrayLike

from topoflow.tools.prepare.clock import Clock, parse_zone, read_times
from topoflow.tools.prepare.findings import Findings
from topoflow.tools.prepare.recipe import Source

Rule = Literal["refuse", "first", "last", "mean"]
START = np.datetime64("2019-01-01T00", "h")
HOURS = START + np.arange(48)


def source_of(**options) -> Source:
    return Source(path="x.nc", **options)


def read(
    dataset: xr.Dataset, duplicates: Literal["refuse", "first", "last", "mean"] = "refuse", **options
) -> tuple[Clock | None, list]:
    findings = Findings()
    clock = read_times(dataset, source_of(**options), findings, "x.nc", duplicates)
    return clock, findings.sorted()


def clock_of(dataset: xr.Dataset, severities=(), **options) -> Clock:
    clock, findings = read(dataset, **options)
    assert clock is not None, [finding.line() for finding in findings]
    assert [finding.severity for finding in findings] == list(severities)
    assert clock.times.dtype == "M8[h]"
    return clock


def finding_of(dataset: xr.Dataset, severity: str, **options) -> str:
    clock, (finding,) = read(dataset, **options)
    assert clock is None
    assert finding.severity == severity
    return finding.line()


def hourly(times: ArrayLike = HOURS, **attrs) -> xr.Dataset:
    times = np.asarray(times).astype("M8[ns]")
    return xr.Dataset({"pm25": ("time", np.arange(float(len(times))))}, coords={"time": times}, attrs=attrs)


def raw(values, units: str, **attrs) -> xr.Dataset:
    return xr.Dataset({"time": ("time", np.asarray(values), {"units": units, **attrs})})


def test_hourly_times():
    clock = clock_of(hourly())
    np.testing.assert_array_equal(clock.times, HOURS)
    np.testing.assert_array_equal(clock.order, np.arange(48))
    assert clock.dims == ("time",)
    assert clock.step_hours == 1


@pytest.mark.parametrize("step", [3, 6])
def test_coarser_steps_stay_as_they_are(step):
    times = np.delete(HOURS[::step], 1)  # a gap does not change the step
    clock = clock_of(hourly(times))
    np.testing.assert_array_equal(clock.times, times)
    assert clock.step_hours == step


def test_times_out_of_order_are_sorted():
    clock = clock_of(hourly(HOURS[[3, 1, 0, 2]]), ["note"])
    np.testing.assert_array_equal(clock.times, HOURS[:4])
    np.testing.assert_array_equal(clock.order, [2, 1, 3, 0])


@pytest.mark.parametrize(("rule", "order"), [("first", [0, 1, 3]), ("last", [0, 2, 3]), ("mean", [0, 1, 2, 3])])
def test_an_hour_twice_follows_the_rule(rule, order):
    dataset = hourly(HOURS[[0, 1, 1, 2]])
    clock = clock_of(dataset, ["note"], duplicates=rule)
    np.testing.assert_array_equal(clock.order, order)
    np.testing.assert_array_equal(clock.times, HOURS[:3])
    np.testing.assert_array_equal(clock.index, [0, 1, 1, 2] if rule == "mean" else [0, 1, 2])


def test_an_hour_twice_is_a_decision():
    _, (finding,) = read(hourly(HOURS[[0, 1, 1, 2]]))
    assert "decision x.nc: time: 1 hours occur more than once (first: 2019-01-01T01)" in finding.line()
    assert finding.settle == "rules: {duplicates: first}"


@pytest.mark.parametrize(
    ("dtype", "since", "severities"),
    [("f8", "2018-01-01", []), ("f4", "2018-01-01", []), ("f4", "2010-01-01", ["note"]), ("i4", "1900-01-01", [])],
)
def test_numbers_within_a_minute_of_the_hour_are_that_hour(dtype, since, severities):
    unit = "hours" if dtype == "i4" else "days"
    values = (HOURS - np.datetime64(since)) / np.timedelta64(1, unit[0] if dtype == "i4" else "D")
    dataset = raw(values.astype(dtype), f"{unit} since {since}")
    np.testing.assert_array_equal(clock_of(dataset, severities).times, HOURS)
    np.testing.assert_array_equal(clock_of(xr.decode_cf(dataset), severities).times, HOURS)


def test_stamps_off_the_hour_are_named():
    late = hourly(HOURS.astype("M8[s]") + np.timedelta64(10, "m"))
    assert "48 of 48 times are not whole hours (first: 2019-01-01 00:10:00): expected whole hours" in finding_of(
        late, "decision"
    )


@pytest.mark.parametrize(
    ("stamps", "stamp", "step"),
    [("00:30", "middle", 1), ("00:00", "start", 1), ("01:30", "middle", 3), ("00:00", "start", 3)],
)
def test_means_are_stamped_at_their_end(stamps, stamp, step):
    times = np.datetime64(f"2019-01-01T{stamps}") + 60 * step * np.arange(8)
    # a step of several hours may also be hourly means with gaps, so the move is noted
    clock = clock_of(hourly(times), ["note"] if step > 1 else [], stamp=stamp)
    np.testing.assert_array_equal(clock.times, START + step * np.arange(1, 9))


def test_half_hours_ask_for_the_stamp():
    halves = hourly(HOURS.astype("M8[m]") + 30)
    assert "recipe: stamp: middle" in finding_of(halves, "decision")
    assert "recipe: stamp: end" in finding_of(hourly(), "decision", stamp="middle")


@pytest.mark.parametrize(("stamp", "minutes"), [("start", 0), ("middle", 30), ("end", 60)])
def test_bounds_say_where_stamps_are(stamp, minutes):
    lower = HOURS.astype("M8[ns]")
    dataset = hourly(lower + np.timedelta64(minutes, "m"))
    dataset["time_bnds"] = (("time", "bnds"), np.stack([lower, lower + np.timedelta64(1, "h")], axis=1))
    dataset["time"].attrs["bounds"] = "time_bnds"
    np.testing.assert_array_equal(clock_of(dataset, stamp=stamp).times, HOURS + 1)
    other = "start" if stamp == "end" else "end"
    assert f"recipe: stamp: {stamp}" in finding_of(dataset, "decision", stamp=other)


@pytest.mark.parametrize(
    ("text", "hours"), [("UTC", 0), ("UTC+8", 8), ("GMT-03:30", -3.5), ("+0545", 5.75), ("Asia/Shanghai", 8), ("Z", 0)]
)
def test_zones(text, hours):
    zone = parse_zone(text)
    assert zone is not None
    offset = datetime.datetime(2019, 1, 1, tzinfo=zone).utcoffset()
    assert offset is not None
    assert offset.total_seconds() == 3600 * hours


@pytest.mark.parametrize("text", ["UTC+99", "Mars/Olympus", "", "../etc/passwd", "local"])
def test_unknown_zones(text):
    assert parse_zone(text) is None
    assert "time_zone" in finding_of(hourly(), "error", time_zone=text)


@pytest.mark.parametrize("zone", ["UTC+8", "Asia/Shanghai"])
def test_the_zone_of_the_recipe_is_applied(zone):
    np.testing.assert_array_equal(clock_of(hourly(), time_zone=zone).times, HOURS - 8)


def test_daylight_saving_time():
    july = np.datetime64("2019-07-01T00", "h") + np.arange(24)
    np.testing.assert_array_equal(clock_of(hourly(july), time_zone="Europe/Berlin").times, july - 2)
    night = np.datetime64("2019-10-27T00", "h") + np.arange(6)
    line = finding_of(hourly(night), "decision", time_zone="Europe/Berlin")
    assert "1 stamps are in an hour that the change of clocks in Europe/Berlin repeats or skips" in line
    assert "2019-10-27 02:00:00" in line
    assert "recipe: time_zone: UTC+01:00" in line
    np.testing.assert_array_equal(clock_of(hourly(night), time_zone="UTC+01:00").times, night - 1)


def test_half_hour_zones_need_a_decision():
    assert "whole hours in UTC (time_zone Asia/Kolkata)" in finding_of(hourly(), "decision", time_zone="Asia/Kolkata")


def test_a_zone_that_the_file_states_is_a_decision():
    dataset = hourly(time_zone="UTC+8 (Beijing local time; not verified)")
    assert "recipe: time_zone: UTC+08:00" in finding_of(dataset, "decision")
    np.testing.assert_array_equal(clock_of(dataset, time_zone="Asia/Shanghai").times, HOURS - 8)
    np.testing.assert_array_equal(clock_of(dataset, ["note"], time_zone="UTC+9").times, HOURS - 9)
    np.testing.assert_array_equal(clock_of(hourly(time_zone="UTC")).times, HOURS)


def test_stamps_that_state_their_zone_are_not_moved_twice():
    dataset = xr.decode_cf(raw(np.arange(48), "hours since 2019-01-01 08:00:00 +08:00"))
    np.testing.assert_array_equal(clock_of(dataset).times, HOURS)
    np.testing.assert_array_equal(clock_of(dataset, ["note"], time_zone="UTC+8").times, HOURS)
    table = hourly()
    table["time"].attrs["time_zone"] = "UTC"  # of tables whose stamps had a zone
    np.testing.assert_array_equal(clock_of(table, ["note"], time_zone="UTC+8").times, HOURS)
    texts = xr.Dataset({"time": ("time", ["2019-01-01T00:00:00+08:00", "2019-01-01T01:00:00+08:00"])})
    np.testing.assert_array_equal(clock_of(texts).times, HOURS[:2] - 8)


@pytest.mark.parametrize("calendar", ["noleap", "360_day", "julian"])
@pytest.mark.parametrize("is_decoded", [False, True])
def test_other_calendars_are_refused_by_name(calendar, is_decoded):
    dataset = raw(np.arange(48), "hours since 2019-01-01", calendar=calendar)
    assert f"calendar {calendar!r}" in finding_of(xr.decode_cf(dataset) if is_decoded else dataset, "error")


@pytest.mark.parametrize("calendar", ["standard", "gregorian", "proleptic_gregorian"])
def test_calendars_of_today(calendar):
    dataset = raw(np.arange(48), "hours since 2019-01-01", calendar=calendar)
    np.testing.assert_array_equal(clock_of(dataset).times, HOURS)


@pytest.mark.parametrize("units", ["months since 2019-01-01", "hours since long ago", "", "K"])
def test_numbers_that_are_no_times(units):
    assert "x.nc: time: " in finding_of(raw(np.arange(4.0), units), "error")


def test_files_without_time_ask_for_its_name():
    dataset = xr.Dataset({"pm25": ("n", np.arange(3.0)), "when": ("n", HOURS[:3].astype("M8[ns]"))})
    assert "names: {time: NAME}" in finding_of(dataset, "decision")
    np.testing.assert_array_equal(clock_of(dataset, names={"time": "when"}).times, HOURS[:3])
    assert "'absent'" in finding_of(dataset, "decision", names={"time": "absent"})


def test_missing_times_are_counted():
    times = HOURS.astype("M8[ns]")
    times[5] = "NaT"
    assert "1 of 48 times are missing" in finding_of(hourly(times), "error")
    assert "0 of 0 times" in finding_of(hourly(HOURS[:0]), "error")


def test_a_file_of_one_hour():
    dataset = hourly().isel(time=3)
    clock = clock_of(dataset)
    assert clock.dims == ()
    assert clock.step_hours is None
    np.testing.assert_array_equal(clock.times, HOURS[3:4])
    np.testing.assert_array_equal(clock_of(hourly(HOURS[3:4]), stamp="start").times, HOURS[4:5])


@pytest.mark.parametrize("is_joined", [False, True])
def test_times_of_wrf(is_joined):
    texts = np.array([str(hour.astype("M8[s]")).replace("T", "_") for hour in HOURS], "S19")
    times = ("Time", texts) if is_joined else (("Time", "DateStrLen"), texts.view("S1").reshape(48, 19))
    dataset = xr.Dataset({"Times": times, "XTIME": ("Time", (HOURS + 1).astype("M8[ns]"))})
    clock = clock_of(dataset)
    np.testing.assert_array_equal(clock.times, HOURS)
    assert clock.dims == ("Time",)


def test_times_of_cmaq():
    flags = np.zeros((3, 2, 2), "i4")
    flags[:, :, 0], flags[:, :, 1] = 2019365, np.array([[220000], [230000], [0]])
    flags[2, :, 0] = 2020001
    clock = clock_of(xr.Dataset({"TFLAG": (("TSTEP", "VAR", "DATE-TIME"), flags)}))
    np.testing.assert_array_equal(clock.times, np.datetime64("2019-12-31T22", "h") + np.arange(3))


def test_times_of_cams_europe():
    dataset = raw(np.arange(48, dtype="f4"), "hours", long_name="ANALYSIS time from 20190101")
    np.testing.assert_array_equal(clock_of(dataset).times, HOURS)
    np.testing.assert_array_equal(clock_of(xr.decode_cf(dataset, decode_timedelta=True)).times, HOURS)


def test_days_as_numbers_of_eight_digits():
    dataset = raw([20190101.0, 20190101.5, 20190102.25], "day as %Y%m%d.%f")
    np.testing.assert_array_equal(clock_of(dataset).times, START + np.array([0, 12, 30]))


def forecasts(has_valid_time: bool) -> xr.Dataset:
    """Two forecasts, 12 hours apart, of 0, 3, 6, 9 hours ahead, as cfgrib names them."""
    time, step = HOURS[[0, 12]].astype("M8[ns]"), np.arange(0, 12, 3).astype("m8[h]").astype("m8[ns]")
    dataset = xr.Dataset(
        {"pm25": (("time", "step"), np.arange(8.0).reshape(2, 4))},
        coords={"time": ("time", time, {"standard_name": "forecast_reference_time"}), "step": step},
    )
    valid = time[:, None] + step
    return dataset.assign_coords(valid_time=(("time", "step"), valid)) if has_valid_time else dataset


@pytest.mark.parametrize("has_valid_time", [False, True])
def test_forecasts_have_the_time_that_they_are_for(has_valid_time):
    clock = clock_of(forecasts(has_valid_time))
    np.testing.assert_array_equal(clock.times, START + 3 * np.arange(8))
    assert clock.dims == ("time", "step")
    assert clock.step_hours == 3


def test_no_lead_time_is_added_to_valid_time():
    dataset = forecasts(True).isel(step=2)
    assert "step" in dataset.coords
    np.testing.assert_array_equal(clock_of(dataset).times, START + np.array([6, 18]))


@pytest.mark.skipif(
    "TOPOFLOW_SHARED" not in os.environ, reason="TOPOFLOW_SHARED is not set: the real data are not here"
)
@pytest.mark.parametrize("name", ["china_cnemc_2019_hourly.nc", "beijing_12_stations_2013_2017_hourly.nc"])
def test_real_files_state_their_zone(name):
    with xr.open_dataset(Path(os.environ["TOPOFLOW_SHARED"]) / "data" / name) as dataset:
        assert "recipe: time_zone: UTC+08:00" in finding_of(dataset, "decision")
        clock = clock_of(dataset, time_zone="Asia/Shanghai")
        local = pd.DatetimeIndex(dataset["time"].values).tz_localize("Asia/Shanghai")
        np.testing.assert_array_equal(clock.times, local.tz_convert(None).to_numpy().astype("M8[h]"))
        assert clock.step_hours == 1
