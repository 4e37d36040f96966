"""Files of one hour, whose variables have no dimension of time."""

import numpy as np
import pytest

from tests.support.prepare_worlds import gridded, prepare_paths, prepare_recipe


def test_files_of_one_hour_without_a_dimension_of_time_are_read(tmp_path):
    dataset = gridded(6)
    for hour in range(6):
        dataset.isel(time=hour).to_netcdf(tmp_path / f"hour{hour}.nc")
    _, data = prepare_paths(tmp_path, "hour*.nc")
    np.testing.assert_array_equal(data.read("pm25", slice(None)), dataset.pm25.values[:, ::-1])


def test_the_last_hour_of_a_file_of_its_own_is_not_lost(tmp_path):
    dataset = gridded(6)
    dataset.isel(time=slice(0, 5)).to_netcdf(tmp_path / "a.nc")
    dataset.isel(time=5).to_netcdf(tmp_path / "b.nc")
    _, data = prepare_paths(tmp_path, "*.nc")
    assert len(data.times) == 6


def test_a_variable_that_does_not_change_in_a_file_of_many_times_is_named(tmp_path):
    dataset = gridded(6, pm25="ug m-3", o3="ug m-3")
    dataset["o3"] = dataset.o3.isel(time=0, drop=True)
    dataset.to_netcdf(tmp_path / "data.nc")
    done, data = prepare_paths(tmp_path, "data.nc")
    assert data.dynamic == ("pm25",)
    assert any("o3" in line and "left out" in line for line in done.lines)


def test_the_recipe_says_where_names_of_files_have_the_time(tmp_path):
    dataset = gridded(3)
    for hour in range(3):
        dataset.isel(time=hour, drop=True).to_netcdf(tmp_path / f"CN-Reanalysis20190101{hour:02}.nc")
    source = {"path": "CN-*.nc"}
    done, _ = prepare_recipe(tmp_path, {"sources": [source]})
    assert any("time_in_name" in line for line in done.lines)
    _, data = prepare_recipe(tmp_path, {"sources": [{**source, "time_in_name": "CN-Reanalysis%Y%m%d%H"}]})
    assert list(map(str, data.times)) == ["2019-01-01T00", "2019-01-01T01", "2019-01-01T02"]
    np.testing.assert_array_equal(data.read("pm25", slice(None)), dataset.pm25.values[:, ::-1])


@pytest.mark.parametrize("pattern", ["CN_%Y%m%d%H", "CN-Reanalysis", "Reanalysis%m%d", "CN-Reanalysis%Y%d%m%H"])
def test_names_without_the_time_that_the_recipe_says_are_refused(tmp_path, pattern):
    gridded(1).isel(time=0, drop=True).to_netcdf(tmp_path / "CN-Reanalysis2019013100.nc")
    done, _ = prepare_recipe(tmp_path, {"sources": [{"path": "CN-*.nc", "time_in_name": pattern}]})
    assert any("in its name" in line for line in done.lines)
