"""Inputs at several hours, compared with xarray's own selection; they need no target."""

import numpy as np
import pytest
import xarray as xr

from tests.support.prepared import write_prepared
from topoflow.data.assembly import open_forecast_data
from topoflow.data.channels import Channel, input_channels, input_names, window_hours
from topoflow.data.forecast_error import ForecastSkill, WeatherErrors
from topoflow.data.inputs import InputReader
from topoflow.data.normalization import Normalization
from topoflow.data.prepared.reader import PreparedData, index_prepared
from topoflow.errors import ConfigError, DataError

HOURS = {"u": (0, 6, 12), "pm25": (0, -24), "co": (-3,)}
NAMES = ("u", "u+6h", "u+12h", "elevation", "pm25", "pm25-24h", "co-3h", "hour_sin", "v")
VARIABLES = ("u", "elevation", "pm25", "co", "hour_sin", "v")
NORMALIZATION = Normalization(
    {**dict.fromkeys(VARIABLES, 30.0), "hour_sin": 0.0, "available": 0.0},
    {**dict.fromkeys(VARIABLES, 7.0), "hour_sin": 1.0, "available": 1.0},
)


def test_channels_are_named_by_variable_and_hour_in_the_order_of_the_variables(make_config, tmp_path):
    config = make_config(tmp_path, variables=VARIABLES, targets=("pm25",), hours=HOURS, availability=True)
    assert input_names(config) == (*NAMES, "available")
    assert input_channels(config)[5] == Channel("pm25", -24)
    assert window_hours(config) == (-24, 12)
    assert window_hours(make_config(tmp_path, lead_times_hours=(6, 48), hours=HOURS, variables=VARIABLES)) == (-24, 48)
    assert window_hours(make_config(tmp_path)) == (0, 3)


@pytest.mark.parametrize("step_hours", [1, 3])
def test_each_channel_is_its_variable_at_its_hour(make_fields, make_config, tmp_path, step_hours):
    fields = make_fields(hours=60, step_hours=step_hours)
    folder = write_prepared(fields, tmp_path / "data", step_hours=step_hours)
    config = make_config(folder, variables=VARIABLES, targets=("pm25",), hours=HOURS, availability=True)
    data = PreparedData(index_prepared(str(folder)))
    reader = InputReader(data, NORMALIZATION, input_channels(config), with_wind=True)
    x, wind = np.empty(reader.shape, np.float32), np.empty(reader.wind_shape, np.float32)
    start = 30
    reader.fill(start, x, wind)
    time, present = fields.time.values[start], []
    for row, channel in enumerate(input_channels(config)[:-1]):
        if channel.variable == "hour_sin":
            expected = np.full(x[row].shape, np.sin(2 * np.pi * fields.time.dt.hour.values[start] / 24))
        elif channel.variable == "elevation":
            expected = (fields.elevation.values - 30) / 7
        else:
            expected = fields[channel.variable].sel(time=time + np.timedelta64(channel.hours, "h")).values
            present.append(~np.isnan(expected))
            expected = np.nan_to_num((expected - 30) / 7)
        np.testing.assert_allclose(x[row], expected, rtol=1e-5, atol=1e-5, err_msg=channel.name)
    np.testing.assert_allclose(x[-1], np.mean(present, axis=0), atol=1e-6)
    for row, name in enumerate(("u", "v")):  # the wind is that of the start
        there = ~np.isnan(fields[name].values[start])
        np.testing.assert_array_equal(wind[row][there], fields[name].values[start][there])


def test_the_last_hour_of_the_data_has_inputs_though_no_target(make_fields, make_config, tmp_path):
    fields = make_fields(hours=48)
    folder = write_prepared(fields, tmp_path / "data")
    config = make_config(folder, variables=("pm25", "u"), targets=("pm25",), hours={"pm25": (0, -24)})
    data = PreparedData(index_prepared(str(folder)))
    reader = InputReader(data, NORMALIZATION, input_channels(config), with_wind=False)
    x = np.empty(reader.shape, np.float32)
    reader.fill(47, x, np.empty(reader.wind_shape, np.float32))
    np.testing.assert_allclose(x[1], np.nan_to_num((fields.pm25.values[23] - 30) / 7), rtol=1e-5, atol=1e-5)


def test_starts_leave_room_for_the_earliest_and_the_latest_input(make_fields, make_config, tmp_path):
    folder = write_prepared(make_fields(hours=96), tmp_path / "data")
    days = (("2019-01-01", "2019-01-04"),)
    config = make_config(folder, train=days, variables=("u", "pm25"), targets=("pm25",), hours={"u": (-5, 9)})
    data = open_forecast_data(config, with_wind=False, with_terrain=False)
    np.testing.assert_array_equal(data.splits["train"].starts, np.arange(5, 96 - 9))
    dataset = data.dataset("train", data.build_normalization())
    assert dataset.normalization.to_dict().keys() == {"u", "pm25"}
    assert dataset.input_names == ("u-5h", "u+9h", "pm25")
    assert dataset[0]["x"].shape == (3, 4, 6)


def test_a_further_variable_is_an_input_and_a_target_like_any_other(make_fields, make_config, tmp_path):
    fields = make_fields()
    fields["blh"] = (fields.u * 10 + 500).assign_attrs(units="m")
    fields["nh3"] = fields.co.assign_attrs(units="ug m-3")
    folder = write_prepared(fields, tmp_path / "data")
    config = make_config(folder, variables=("blh", "co"), targets=("nh3",), hours={"blh": (0, 3)})
    data = open_forecast_data(config, with_wind=False, with_terrain=False)
    dataset = data.dataset("train", data.build_normalization())
    assert dataset.input_names == ("blh", "blh+3h", "co")
    start, target, _ = dataset.positions(1)
    mean, std = dataset.normalization.mean["blh"], dataset.normalization.std["blh"]
    expected = np.nan_to_num((fields.blh.values[start + 3] - mean) / std)
    np.testing.assert_allclose(dataset[1]["x"][1], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(dataset[1]["valid"][0], ~np.isnan(fields.nh3.values[target]))


SKILL = ForecastSkill.parse("6:0.9,24:0.3")
DAY = np.timedelta64(1, "D")


def usual(time):
    """Return a cycle of the day and a trend that `make_weather` has, for u and co."""
    hours = int((time - np.datetime64("2018-12-01")) / np.timedelta64(1, "h"))
    return np.full((2, 4, 6), 10.0 * (hours % 24) + 0.1 * hours)


@pytest.fixture
def make_weather(make_fields, tmp_path):
    """Return noise about `usual`, 120 days of every sixth hour, 7 of which are missing, and their errors."""

    def make(hours=(6, 12, 24), skill=SKILL, seed=0, days=120):
        fields = make_fields(names=("u", "v", "co"), hours=4 * days, step_hours=6, start="2018-12-01")
        for name in ("u", "co"):
            fields[name] += xr.DataArray([usual(time)[0, 0, 0] - 50 for time in fields.time.values], dims="time")
        fields = fields.isel(time=[*range(280), *range(287, 480)] if days == 120 else slice(None))
        data = PreparedData(index_prepared(str(write_prepared(fields, tmp_path / f"{days}", step_hours=6))))
        return data, WeatherErrors(data, ("u", "co"), usual, hours, skill, seed)

    return make


@pytest.mark.parametrize(("steps", "r"), [(1, 0.9), (2, 0.7), (4, 0.3)])
def test_weather_with_errors_has_the_correlation_asked_for_and_the_variance_of_the_truth(make_weather, steps, r):
    data, errors = make_weather()
    starts = [*range(276), *range(280, 460)]
    forecast, truth, other = (np.empty((len(starts), 2, 4, 6)) for _ in range(3))
    for row, start in enumerate(starts):
        forecast[row] = errors.at(("u", "co"), start, start + steps) - usual(data.times[start + steps])
        truth[row] = data.at(("u", "co"), start + steps) - usual(data.times[start + steps])
        other[row] = data.at(("u", "co"), errors.other_time(start) + steps)
    both = np.isfinite(forecast)
    np.testing.assert_array_equal(both, np.isfinite(truth) & np.isfinite(other))
    assert both.sum() > 17_000  # the sampling error of a correlation is below 0.01
    assert np.corrcoef(forecast[both], truth[both])[0, 1] == pytest.approx(r, abs=0.03)
    assert forecast[both].std() == pytest.approx(truth[both].std(), rel=0.03)


def test_errors_of_a_start_are_the_anomalies_of_one_other_time_of_the_season(make_weather):
    data, errors = make_weather()
    values = {name: data.read(name, slice(None)) for name in ("u", "co")}
    cycle, shifts = np.stack([usual(time)[0] for time in data.times]), []
    for start in range(0, 270, 9):
        found = {}
        for steps, r in ((1, 0.9), (2, 0.7), (4, 0.3)):
            now = cycle[start + steps]
            for name, field in zip(("u", "co"), errors.at(("u", "co"), start, start + steps), strict=True):
                error = (field - now - r * (values[name][start + steps] - now)) / np.sqrt(1 - r**2)
                residuals = np.nanmax(np.abs(values[name] - cycle - error), axis=(1, 2))
                found[steps, name] = data.times[int(residuals.argmin())] - data.times[start + steps]
                assert residuals.min() < 1e-2
        [shift] = set(found.values())
        assert shift % DAY == 0
        assert 5 * DAY <= abs(shift) <= 30 * DAY
        shifts.append(shift)
    assert len(set(shifts)) > 15
    draws = [make_weather(seed=seed)[1].other_time(50) for seed in range(4)]
    assert draws[0] == errors.other_time(50)
    assert len(set(draws)) > 1


def test_without_error_and_before_the_start_inputs_are_those_of_the_data(make_weather, make_config):
    data, errors = make_weather(hours=(6, 24), skill=ForecastSkill.parse("0:0.5,6:1,12:1,24:0"))
    config = make_config(data.folder, variables=("u", "co"), targets=("v",), hours={"u": (-6, 0, 6), "co": (24, 0)})
    x, wind = {}, {}
    for given in (None, errors):
        reader = InputReader(data, NORMALIZATION, input_channels(config), with_wind=True, ahead=given)
        x[given], wind[given] = np.empty(reader.shape, np.float32), np.empty(reader.wind_shape, np.float32)
        reader.fill(50, x[given], wind[given])
    np.testing.assert_array_equal(wind[None], wind[errors])
    for row, name in enumerate(input_names(config)):
        assert np.array_equal(x[None][row], x[errors][row]) is (name != "co+24h")


def test_data_without_another_time_of_the_season_have_no_errors(make_weather):
    _, errors = make_weather(days=5)
    with pytest.raises(DataError, match="--forecast-error: no other time for 2018-12-02T06: expected data at the same"):
        errors.other_time(5)


@pytest.mark.parametrize(
    "text", ["", "24", "0:1,x:0.5", "24:0.5,12:0.9", "0:1,0:0.5", "-1:1", "0:1.1", "0:nan", "1:2:3"]
)
def test_unusable_correlations_are_refused(text):
    with pytest.raises(ConfigError, match=r"--forecast-error: .* expected HOURS:CORRELATION"):
        ForecastSkill.parse(text)
