"""Values that could be, but stand for none: numbers apart from all others, fields of one value, packed fill values."""

import netCDF4
import numpy as np
import pytest

from tests.support.prepare_worlds import gridded, prepare_paths


def open_lines(done):
    return [line for line in done.lines if line.startswith(("error", "decision"))]


@pytest.mark.parametrize("mark", [-1.0, -9.0, 999.0, 9999.0, 500.0])
def test_a_number_far_from_all_others_that_occurs_often_needs_a_decision(tmp_path, mark):
    dataset = gridded()
    dataset.pm25[:, :2, :2] = mark
    dataset.to_netcdf(tmp_path / "data.nc")
    done, _ = prepare_paths(tmp_path, "data.nc")
    [line] = open_lines(done)
    assert "pm25" in line
    assert f"pm25 == {mark:g}" in line
    _, data = prepare_paths(tmp_path, "data.nc", rules={"drop": [f"pm25 == {mark:g}"]})
    assert np.isnan(data.read("pm25", slice(None))).sum() == 48 * 4


def test_a_mark_is_counted_over_files(tmp_path):
    dataset = gridded()
    dataset.pm25[:, 0, 0] = 999.0
    for hour in range(48):
        dataset.isel(time=[hour]).to_netcdf(tmp_path / f"hour{hour:02}.nc")
    done, _ = prepare_paths(tmp_path, "hour*.nc")
    assert ["48 times" in line for line in open_lines(done)] == [True]


def test_a_mark_is_named_in_the_unit_of_the_file(tmp_path):
    dataset = gridded(co="mg m-3") / 40
    dataset.co.attrs["units"] = "mg m-3"
    dataset.co[:, 0, 0] = 99.0
    dataset.to_netcdf(tmp_path / "data.nc")
    done, _ = prepare_paths(tmp_path, "data.nc")
    assert "co == 99" in open_lines(done)[0]
    _, data = prepare_paths(tmp_path, "data.nc", rules={"drop": ["co == 99"]})
    assert np.nanmax(data.read("co", slice(None))) < 2000


def test_a_value_that_the_recipe_keeps_is_written(tmp_path):
    dataset = gridded(pm25="ug m-3", pm10="ug m-3")
    dataset.pm25[:, 0, 0] = 999.0
    dataset.pm10[5, 3, 3] = 25000.0
    dataset.to_netcdf(tmp_path / "data.nc")
    done, _ = prepare_paths(tmp_path, "data.nc")
    assert len(open_lines(done)) == 2
    _, data = prepare_paths(tmp_path, "data.nc", rules={"keep": ["pm25 == 999", "pm10 > 20000"]})
    assert data.read("pm25", slice(None))[:, -1, 0].tolist() == [999.0] * 48
    assert data.read("pm10", [5]).max() == 25000.0


@pytest.mark.parametrize("noise", [-0.3, -3.0])
def test_noise_around_zero_is_no_mark(tmp_path, noise):
    dataset = gridded()
    dataset.pm25[:] = np.abs(dataset.pm25)
    dataset.pm25[:20, 0, 0] = noise
    dataset.pm25[:10, 1, 0] = noise * 0.7
    dataset.to_netcdf(tmp_path / "data.nc")
    done, _ = prepare_paths(tmp_path, "data.nc")
    assert open_lines(done) == []


@pytest.mark.parametrize("files", [1, 6])
def test_fields_of_one_value_need_a_decision_however_the_hours_lie_in_files(tmp_path, files):
    dataset = gridded(24 * 36)
    dataset.pm25[24 * 30 :] = 45.0
    for k, part in enumerate(np.array_split(np.arange(24 * 36), files)):
        dataset.isel(time=part).to_netcdf(tmp_path / f"part{k}.nc")
    done, _ = prepare_paths(tmp_path, "part*.nc")
    assert any("one value everywhere" in line for line in open_lines(done))
    _, data = prepare_paths(tmp_path, "part*.nc", rules={"constant": "drop"})
    assert np.isnan(data.read("pm25", slice(24 * 30, None))).all()


def test_data_of_one_value_throughout_are_written(tmp_path):
    dataset = gridded()
    dataset.pm25[:] = 45.0
    dataset.to_netcdf(tmp_path / "data.nc")
    done, _ = prepare_paths(tmp_path, "data.nc")
    assert done.is_decided


def test_packed_values_that_were_never_written_are_missing(tmp_path):
    dataset = gridded(t2m="K") + 240
    dataset.t2m.attrs["units"] = "K"
    packing = {"dtype": "i2", "scale_factor": 0.002, "add_offset": 280.0}
    dataset.to_netcdf(tmp_path / "data.nc", encoding={"t2m": packing})
    with netCDF4.Dataset(tmp_path / "data.nc", "a") as file:
        file.set_auto_maskandscale(False)
        assert "_FillValue" not in file["t2m"].ncattrs()
        file["t2m"][:, :2] = -32767  # 214.5 K
    done, data = prepare_paths(tmp_path, "data.nc")
    assert np.isnan(data.read("temp", slice(None))).sum() == 48 * 2 * 8
    assert any("t2m" in line and "-32767" in line for line in done.lines)
