"""Inputs at several hours, compared with xarray's own selection; they need no target."""

import numpy as np
import pytest

from tests.support.prepared import write_prepared
from topoflow.data.assembly import open_forecast_data
from topoflow.data.channels import Channel, input_channels, input_names, window_hours
from topoflow.data.inputs import InputReader
from topoflow.data.normalization import Normalization
from topoflow.data.prepared.reader import PreparedData, index_prepared

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
