"""Stamps that are not the end of a whole hour in UTC: by their bounds, by their zone, or finer than hours."""

import numpy as np
import pytest

from tests.support.prepare_worlds import gridded, prepare_recipe


@pytest.mark.parametrize(("place", "offset"), [("start", 0), ("middle", 30), ("end", 60)])
@pytest.mark.parametrize("has_units", [False, True])
def test_bounds_of_files_say_where_stamps_are(tmp_path, place, offset, has_units):
    dataset = gridded(24)
    minutes = 60 * np.arange(24)
    units = {"units": "minutes since 2019-01-01"}
    dataset = dataset.assign_coords(time=("time", minutes + offset, {**units, "bounds": "time_bnds"}))
    bounds = np.stack([minutes, minutes + 60], axis=1)
    dataset["time_bnds"] = (("time", "nv"), bounds, units if has_units else {})
    dataset.to_netcdf(tmp_path / "data.nc")
    done, _ = prepare_recipe(tmp_path, {"sources": [{"path": "data.nc"}]})
    assert done.is_decided == (place == "end")
    _, data = prepare_recipe(tmp_path, {"sources": [{"path": "data.nc", "stamp": place}]})
    assert str(data.times[0]) == "2019-01-01T01"


@pytest.mark.parametrize(
    ("zone", "first"), [("UTC+5:30", "2018-12-31T19"), ("UTC+5:45", "2018-12-31T18"), ("UTC-3:30", "2019-01-01T04")]
)
def test_zones_of_half_and_quarter_hours_need_a_decision(tmp_path, zone, first):
    gridded(24).to_netcdf(tmp_path / "data.nc")
    source = {"path": "data.nc", "time_zone": zone}
    done, _ = prepare_recipe(tmp_path, {"sources": [source]})
    assert any("off_hour: nearest" in line for line in done.lines)
    done, data = prepare_recipe(tmp_path, {"sources": [{**source, "off_hour": "nearest"}]})
    assert str(data.times[0]) == first
    assert any("minutes" in line and "nearest" in line for line in done.lines)


def test_times_finer_than_hours_are_refused_with_the_way_out(tmp_path):
    dataset = gridded(24)
    time = np.datetime64("2019-01-01", "ns") + np.arange(24) * np.timedelta64(10, "m")
    dataset.assign_coords(time=time).to_netcdf(tmp_path / "data.nc")
    for off_hour in ("refuse", "nearest"):
        done, _ = prepare_recipe(tmp_path, {"sources": [{"path": "data.nc", "off_hour": off_hour}]})
        assert any("average them over hours" in line for line in done.lines)
