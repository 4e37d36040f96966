"""Weather forecasts as people have them, prepared by time of issue and step."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from topoflow.data.prepared.reader import PreparedData, index_prepared
from topoflow.errors import ConfigError
from topoflow.tools.prepare.command import prepare
from topoflow.tools.prepare.recipe import Recipe, Source

ISSUES = pd.date_range("2019-01-01", periods=6, freq="12h").to_numpy()
STEPS = np.array([0, 6, 12, 18, 24])
LAT, LON = np.array([40.0, 39.0, 38.0]), np.array([10.0, 11.0, 12.0, 13.0])
HOUR = np.timedelta64(1, "h").astype("m8[ns]")
WRITTEN = (0, 12, 24)


@pytest.fixture
def forecasts():
    """Return u10 and v10 (issue, step, latitude, longitude)."""
    rng = np.random.default_rng(0)
    dims, shape = ("issue", "step", "latitude", "longitude"), (len(ISSUES), len(STEPS), len(LAT), len(LON))
    coords = {
        "issue": ISSUES,
        "step": STEPS,
        "latitude": ("latitude", LAT, {"units": "degrees_north"}),
        "longitude": ("longitude", LON, {"units": "degrees_east"}),
    }
    fields = {name: (dims, rng.normal(0, 5, shape).astype("f4"), {"units": "m s-1"}) for name in ("u10", "v10")}
    return xr.Dataset(fields, coords)


def as_one_cube(forecasts, folder):
    """As the Climate Data Store has them: all issues and steps, and a valid time of two dimensions."""
    valid = ISSUES[:, None] + STEPS * HOUR
    names = {"issue": "forecast_reference_time", "step": "forecast_period"}
    cube = forecasts.rename(names).assign_coords(valid_time=(tuple(names.values()), valid))
    cube["forecast_reference_time"].attrs["standard_name"] = "forecast_reference_time"
    cube["forecast_period"].attrs |= {"standard_name": "forecast_period", "units": "hours"}
    cube.to_netcdf(folder / "all.nc")


def as_a_cube_with_start_and_step_only(forecasts, folder):
    cube = forecasts.rename(issue="time").transpose("step", "time", ...)
    cube["time"].attrs["standard_name"] = "forecast_reference_time"
    cube["step"].attrs |= {"standard_name": "forecast_period", "units": "hours"}
    cube.to_netcdf(folder / "all.nc")


def as_one_file_an_issue(forecasts, folder):
    """As cfgrib writes a GRIB file: scalar time of issue, timedelta steps, their valid times."""
    for number, issue in enumerate(ISSUES):
        one = forecasts.isel(issue=number, drop=True).assign_coords(
            step=STEPS * HOUR, time=issue, valid_time=("step", issue + STEPS * HOUR)
        )
        one["time"].attrs["standard_name"] = "forecast_reference_time"
        one["step"].attrs["standard_name"] = "forecast_period"
        one["valid_time"].attrs["standard_name"] = "time"
        one.to_netcdf(folder / f"{number}.nc")


def as_one_file_an_issue_and_step(forecasts, folder):
    for (i, issue), (k, step) in ((i, k) for i in enumerate(ISSUES) for k in enumerate(STEPS)):
        one = forecasts.isel(issue=i, step=[k]).drop_vars(["issue", "step"]).rename(step="time")
        one = one.assign_coords(time=[issue + step * HOUR], forecast_reference_time=issue)
        one["forecast_reference_time"].attrs["standard_name"] = "forecast_reference_time"
        one.to_netcdf(folder / f"{i}_{step}.nc")


def as_wrf_states_its_start(forecasts, folder):
    for number, issue in enumerate(ISSUES):
        one = forecasts.isel(issue=number, drop=True).drop_vars("step").rename(step="time")
        one = one.assign_coords(time=issue + STEPS * HOUR)
        one.attrs["SIMULATION_START_DATE"] = str(issue)[:19].replace("T", "_")
        one.to_netcdf(folder / f"{number}.nc")


def as_names_of_files_say(forecasts, folder):
    for number, issue in enumerate(ISSUES):
        one = forecasts.isel(issue=number, drop=True).drop_vars("step").rename(step="time")
        stamp = pd.Timestamp(issue).strftime("%Y%m%d%H")
        one.assign_coords(time=issue + STEPS * HOUR).to_netcdf(folder / f"run_{stamp}.nc")


LAYOUTS = [
    as_one_cube,
    as_a_cube_with_start_and_step_only,
    as_one_file_an_issue,
    as_one_file_an_issue_and_step,
    as_wrf_states_its_start,
    as_names_of_files_say,
]


def recipe_of(folder, layout=as_one_cube, **changes):
    in_name = "run_%Y%m%d%H" if layout is as_names_of_files_say else None
    return Recipe(sources=(Source(path=str(folder), time_in_name=in_name),), **{"steps": WRITTEN, **changes})


def read(folder):
    return PreparedData(index_prepared(str(folder)))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_each_layout_is_prepared_by_issue_and_step(forecasts, tmp_path, layout):
    raw = tmp_path / "raw"
    raw.mkdir()
    layout(forecasts, raw)
    done = prepare(recipe_of(raw, layout), tmp_path / "out", progress=False)
    assert done.is_decided, done.findings
    data = read(tmp_path / "out")
    assert data.dynamic == ("u", "v", "u+12h", "v+12h", "u+24h", "v+24h")
    assert data.units["v+24h"] == "m s-1"
    assert data.step_hours == 12
    np.testing.assert_array_equal(data.times, ISSUES.astype("datetime64[h]"))
    for name in data.dynamic:
        variable, _, step = name.removesuffix("h").partition("+")
        expected = forecasts[f"{variable}10"].sel(step=int(step or 0)).values
        np.testing.assert_array_equal(data.read(name, slice(None)), expected, err_msg=name)


def test_the_day_in_the_name_of_cams_european_times_is_that_of_issue(forecasts, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    for number in (0, 2, 4):  # issued at 0 h
        one = forecasts.isel(issue=number, drop=True).drop_vars("step").rename(step="time").assign_coords(time=STEPS)
        day = pd.Timestamp(ISSUES[number]).strftime("%Y%m%d")
        one["time"].attrs |= {"long_name": f"FORECAST time from {day}", "units": "hours"}
        one.to_netcdf(raw / f"{number}.nc")
    done = prepare(recipe_of(raw), tmp_path / "out", progress=False)
    assert done.is_decided, done.findings
    data = read(tmp_path / "out")
    np.testing.assert_array_equal(data.times, ISSUES[::2].astype("datetime64[h]"))
    np.testing.assert_array_equal(data.read("v+24h", slice(None)), forecasts["v10"].isel(issue=[0, 2, 4], step=4))


def test_issues_without_all_steps_are_left_out_and_counted(forecasts, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    as_one_file_an_issue_and_step(forecasts, raw)
    (raw / "2_12.nc").unlink()
    done = prepare(recipe_of(raw), tmp_path / "out", progress=False)
    assert "note     recipe: 1 of 6 issues lack a step: left out" in done.findings
    np.testing.assert_array_equal(read(tmp_path / "out").times, np.delete(ISSUES, 2).astype("datetime64[h]"))


def test_new_issues_are_appended_and_an_interrupted_run_goes_on(forecasts, tmp_path):
    first, later = tmp_path / "first", tmp_path / "all"
    for folder, count in ((first, 3), (later, 6)):
        folder.mkdir()
        as_one_file_an_issue_and_step(forecasts, folder)
        for path in folder.glob("*.nc"):
            if int(path.name.partition("_")[0]) >= count:
                path.unlink()
    prepare(recipe_of(first), tmp_path / "out", progress=False)
    prepare(recipe_of(later), tmp_path / "out", progress=False)
    prepare(recipe_of(later), tmp_path / "at_once", progress=False)
    for name in ("u", "v+24h"):
        grown, whole = (read(tmp_path / out).read(name, slice(None)) for out in ("out", "at_once"))
        np.testing.assert_array_equal(grown, whole)


def test_values_that_cannot_be_are_found_at_every_step(forecasts, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    forecasts["u10"][3, 4, 0, 0] = 500.0
    as_one_cube(forecasts, raw)
    done = prepare(recipe_of(raw), tmp_path / "out", progress=False)
    assert not done.is_decided
    assert any("all.nc: u: 1 values that cannot be, such as 500 m s-1" in line for line in done.findings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": (6, 0)}, r"steps: \[6, 0\]: expected increasing hours after the issue"),
        ({"steps": (-6, 0)}, r"steps: \[-6, 0\]: expected increasing hours after the issue"),
        ({"frequency": "6h"}, "steps: with frequency: expected one of them"),
    ],
)
def test_steps_that_cannot_be_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        prepare(recipe_of(tmp_path, **changes), tmp_path / "out", progress=False)


def test_steps_that_no_file_has_and_files_without_an_issue_are_errors(forecasts, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    as_names_of_files_say(forecasts, raw)
    named = recipe_of(raw, as_names_of_files_say)
    done = prepare(dataclasses.replace(named, steps=(0, 7)), tmp_path / "out", progress=False)
    assert any("nothing 7 h after an issue" in line for line in done.findings)
    done = prepare(recipe_of(raw), tmp_path / "out", progress=False)
    assert any(
        "no time of issue: expected forecast_period or forecast_reference_time" in line for line in done.findings
    )
    assert not (tmp_path / "out").exists()
