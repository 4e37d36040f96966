"""Inputs after the start from the latest forecast that was there, compared with xarray's interpolation."""

import dataclasses

import numpy as np
import pytest
import xarray as xr

from tests.support.prepared import write_prepared
from topoflow.data.assembly import open_forecast_data
from topoflow.data.channels import input_channels, input_names, window_hours
from topoflow.data.inputs import InputReader
from topoflow.data.normalization import Normalization
from topoflow.errors import ConfigError, DataError

STEPS = (0, 6, 12, 24, 36, 54)
HOURS = {"u": (0, 3, 12, 18), "co": (24, 0)}
VARIABLES = ("u", "co", "v")
NORMALIZATION = Normalization(dict.fromkeys((*VARIABLES, "pm25"), 30.0), dict.fromkeys((*VARIABLES, "pm25"), 7.0))
SPLITS = {"train": (("2019-01-02", "2019-01-04"),)}


def make_issued(shape=(4, 6), days=6, per_day=2, steps=STEPS, names=("u", "co"), seed=5):
    """Return forecasts (issue, step, lat, lon) as a Dataset of prepared names over the time of issue."""
    rng, times = (
        np.random.default_rng(seed),
        np.datetime64("2018-12-31", "ns") + np.arange(days * per_day) * (np.timedelta64(24 // per_day, "h")),
    )
    lat, lon = np.linspace(50, 20, shape[0]), np.linspace(80, 130, shape[1])
    issued = xr.Dataset(coords={"time": times, "lat": lat, "lon": lon})
    for step in steps:
        for name in names:
            values = rng.normal(50, 10, (len(times), *shape)).astype(np.float32)
            unit = "m s-1" if name == "u" else "ug m-3"
            issued[f"{name}+{step}h" if step else name] = (("time", "lat", "lon"), values, {"units": unit})
    return issued


def write_issued(issued, folder):
    return write_prepared(issued, folder, step_hours=int(np.diff(issued.time.values[:2])[0] / np.timedelta64(1, "h")))


@pytest.fixture
def make_data(make_fields, make_config, tmp_path):
    """Return the config and its open data, with forecasts `issued`."""
    numbers = iter(range(10))

    def make(issued, **changes):
        path = write_prepared(make_fields(hours=24 * 6, start="2018-12-31"), tmp_path / f"data{next(numbers)}")
        forecast = write_issued(issued, tmp_path / f"issued{next(numbers)}")
        keys = {"variables": VARIABLES, "targets": ("pm25",), "lead_times_hours": (3,), **SPLITS, **changes}
        config = make_config(path, hours=keys.pop("hours", HOURS), forecast=str(forecast), **keys)
        return config, open_forecast_data(config, with_wind=True, with_terrain=False)

    return make


def expected_field(issued, name, start, hours, delay):
    """Interpolate in xarray from the latest forecast that was there."""
    there = issued.time.values + np.timedelta64(delay, "h")
    issue = issued.time.values[there <= start][-1]
    steps = [step for step in STEPS if (f"{name}+{step}h" if step else name) in issued]
    stacked = xr.concat([issued[f"{name}+{step}h" if step else name].drop_attrs() for step in steps], "step")
    stacked = stacked.assign_coords(step=steps).sel(time=issue)
    return stacked.interp(step=(start - issue) / np.timedelta64(1, "h") + hours).values


@pytest.mark.parametrize("delay", [0, 6, 7])
def test_inputs_are_those_of_the_latest_forecast_that_was_there_between_its_steps(make_data, delay):
    issued = make_issued().drop_vars("u+6h")  # variables may have steps of their own
    config, data = make_data(issued, forecast_delay_hours=delay)
    reader = InputReader(data.source, NORMALIZATION, input_channels(config), with_wind=True, ahead=data.forecasts)
    x, wind = np.empty(reader.shape, np.float32), np.empty(reader.wind_shape, np.float32)
    for start in data.starts("train").starts[::5]:
        reader.fill(start, x, wind)
        time = data.source.times[start].astype("datetime64[ns]")
        for row, (name, channel) in enumerate(zip(input_names(config), input_channels(config), strict=True)):
            if channel.hours > 0:
                expected = expected_field(issued, channel.variable, time, channel.hours, delay)
            else:
                expected = np.nan_to_num(data.source.at((channel.variable,), start)[0], nan=30)
            np.testing.assert_allclose(x[row], (expected - 30) / 7, rtol=1e-5, atol=1e-5, err_msg=name)


def test_samples_read_forecasts_and_the_data_need_no_hour_for_them(make_data):
    config, data = make_data(make_issued())
    assert window_hours(config) == (0, 3)
    assert window_hours(dataclasses.replace(config, forecast=None)) == (0, 24)
    dataset = data.dataset("train", NORMALIZATION)
    row = input_names(config).index("co+24h")
    last = len(data.starts("train").starts) - 1
    time = data.source.times[data.starts("train").starts[last]].astype("datetime64[ns]")
    expected = expected_field(make_issued(), "co", time, 24, 6)
    np.testing.assert_allclose(dataset[last]["x"][row].numpy(), (expected - 30) / 7, rtol=1e-5)


def test_starts_without_a_recent_forecast_are_left_out_and_counted(make_data):
    issued = make_issued()
    whole = make_data(issued)[1].starts("train")
    assert (len(whole.starts), whole.without_forecast) == (69, 0)
    gap = (issued.time >= np.datetime64("2019-01-02T12")) & (issued.time < np.datetime64("2019-01-03T12"))
    _, data = make_data(issued.sel(time=~gap))
    kept = data.starts("train")
    # the forecast of the 2nd, 0 h, is there from 6 h on and used for a day: until the 3rd, 6 h; the next from 18 h on
    left_out = data.source.times[np.setdiff1d(whole.starts, kept.starts)]
    assert (left_out[0], left_out[-1]) == (np.datetime64("2019-01-03T07"), np.datetime64("2019-01-03T17"))
    assert kept.without_forecast == len(left_out) == 11
    assert "11 starts skipped for which data.forecast has no forecast" in data.summary()[-1]


def test_starts_that_the_steps_do_not_reach_are_left_out(make_data):
    # 24 h after a start are at most 36 h after the issue: 12 h after it, of which it is there for the last 6
    _, data = make_data(make_issued(steps=(0, 12, 36), per_day=1))
    hours = {int(time.astype(int)) % 24 for time in data.source.times[data.starts("train").starts]}
    assert hours == set(range(6, 13))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": (0, 12, 24)}, "has co from 0 to 24 h after the issue: expected 30 to 30"),
        ({"names": ("u", "com")}, r"has no forecasts of 'co' \(nearest: com\): it has u, com"),
        ({"shape": (4, 8)}, "is elsewhere: 4 x 8 cells.*expected the cells of"),
        ({"seed": 5, "days": 1}, "has no forecast for any start of data.train: its forecasts were issued from 2018"),
    ],
)
def test_forecasts_that_do_not_fit_are_refused(make_data, changes, message):
    with pytest.raises(DataError, match=f"data.forecast: .*{message}"):
        make_data(make_issued(**changes))


def test_forecasts_in_another_unit_are_refused(make_data):
    issued = make_issued()
    for name in issued.data_vars:
        issued[name].attrs["units"] = "kt"
    with pytest.raises(DataError, match=r"data.forecast: .* has u in kt: expected m s-1"):
        make_data(issued)


def test_forecasts_need_hours_after_the_start_and_to_be_prepared(make_config, make_fields, tmp_path):
    with pytest.raises(ConfigError, match=r"data.forecast: .*expected hours after the start in data.hours"):
        make_config(tmp_path, forecast="forecasts")
    path = write_prepared(make_fields(), tmp_path / "data")
    config = make_config(path, hours={"u": (0, 3)}, forecast=str(tmp_path))
    with pytest.raises(DataError, match=r"data.forecast: .* is not prepared data"):
        open_forecast_data(config, with_wind=True, with_terrain=False)


def test_contents_name_the_forecasts_that_a_start_of_the_day_can_read(make_data):
    grown = make_issued(days=20)
    issued = grown.isel(time=slice(12))
    before = make_data(issued)[1].contents
    assert make_data(grown)[1].contents == before
    changed = issued.copy(deep=True)
    changed["co+24h"][3, 0, 0] += 1  # issued on 2019-01-01 at 12 h
    found = make_data(changed)[1].contents
    assert found.difference(before) == "forecasts of co on 2019-01-02"
    digits = len(before.hashes["forecasts of co"]) // len(before.days)
    same = [
        before.hashes["forecasts of co"][k * digits : (k + 1) * digits]
        == found.hashes["forecasts of co"][k * digits : (k + 1) * digits]
        for k in range(len(before.days))
    ]
    assert same == [False, False, True]
    assert found.hashes["forecasts of u"] == before.hashes["forecasts of u"]
