"""`topoflow prepare` as a user runs it: files to a prepared folder that training reads."""

import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from topoflow.cli import main
from topoflow.data.prepared.reader import PreparedData, index_prepared
from topoflow.errors import Refusal
from topoflow.tools.prepare.command import load_recipe, prepare
from topoflow.tools.prepare.recipe import GridSpec, Recipe, recipe_of_paths

SHARED = os.environ.get("TOPOFLOW_SHARED")
HOURS = 60


def small_world(hours=HOURS, names=("pm25", "o3"), start="2019-01-01"):
    draw = np.random.default_rng(0)
    time = np.datetime64(start, "ns") + np.arange(hours) * np.timedelta64(1, "h")
    dataset = xr.Dataset(
        coords={
            "time": time,
            "lat": ("lat", np.linspace(30.0, 37.0, 8), {"units": "degrees_north"}),
            "lon": ("lon", np.linspace(110.0, 115.0, 6), {"units": "degrees_east"}),
        }
    )
    for name in names:
        values = draw.gamma(4.0, 10.0, (hours, 8, 6)).astype("f4")
        values[3, 2, 1] = np.nan
        dataset[name] = (("time", "lat", "lon"), values, {"units": "ug m-3"})
    dataset["elevation"] = (("lat", "lon"), draw.uniform(1, 2000, (8, 6)).astype("f4"), {"units": "m"})
    return dataset


def prepared(paths, output, **changes):
    recipe = recipe_of_paths([str(path) for path in paths])
    done = prepare(replace_rules(recipe, **changes), output, progress=False)
    assert done.is_decided, done.lines
    return done


def replace_rules(recipe, **changes):
    rules = dataclasses.replace(recipe.rules, **changes.pop("rules", {}))
    return dataclasses.replace(recipe, rules=rules, **changes)


def values_of(folder, name, hours=HOURS):
    return open_prepared(folder).read(name, np.arange(hours))


def open_prepared(folder):
    return PreparedData(index_prepared(str(folder)))


@pytest.mark.parametrize("form", ["netcdf 4", "netcdf 3", "zarr 2", "zarr 3", "two files", "columns first", "packed"])
def test_any_form_gives_the_values_that_xarray_reads_north_first(tmp_path, form):
    dataset = small_world()
    expected = dataset.pm25.values[:, ::-1]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "._data.nc").write_bytes(b"\x00\x05\x16\x07" + bytes(400))
    if form.startswith("netcdf"):
        dataset.to_netcdf(folder / "data.nc", format="NETCDF4" if form[-1] == "4" else "NETCDF3_64BIT")
    elif form.startswith("zarr"):
        dataset.to_zarr(folder / "data.zarr", zarr_format=int(form[-1]), consolidated=False)
    elif form == "two files":
        dataset.isel(time=slice(40, None)).to_netcdf(folder / "a.nc")
        dataset.isel(time=slice(0, 40)).to_netcdf(folder / "b.nc")
    elif form == "columns first":
        dataset.transpose("lon", "time", "lat").isel(lon=slice(None, None, -1)).to_netcdf(folder / "data.nc")
    else:
        packing = {"dtype": "i2", "scale_factor": 0.01, "add_offset": 45.0, "_FillValue": -32767}
        dataset.to_netcdf(folder / "data.nc", encoding={"pm25": packing})
        expected = xr.open_dataset(folder / "data.nc").pm25.values[:, ::-1]
    prepared([folder], tmp_path / "out")
    np.testing.assert_array_equal(values_of(tmp_path / "out", "pm25"), expected.astype("f4"))
    data = open_prepared(tmp_path / "out")
    np.testing.assert_array_equal(data.grid.lat2d[:, 0], dataset.lat.values[::-1])
    np.testing.assert_array_equal(data.static("elevation"), dataset.elevation.values[::-1])


def test_weather_and_chemistry_of_different_files_are_joined_and_units_converted(tmp_path):
    chemistry = small_world(names=("pm2p5",))
    chemistry["pm2p5"] = (chemistry.pm2p5 * 1e-9).assign_attrs(units="kg m**-3")
    chemistry.to_netcdf(tmp_path / "cams.nc")
    weather = small_world(names=("t2m", "d2m")).rename(lat="latitude", lon="longitude", time="valid_time")
    weather["t2m"], weather["d2m"] = weather.t2m * 0 + 290, weather.d2m * 0 + 280
    for name in ("t2m", "d2m"):
        weather[name].attrs["units"] = "K"
    weather.drop_vars("elevation").to_netcdf(tmp_path / "era5.nc")
    prepared([tmp_path / "cams.nc", tmp_path / "era5.nc"], tmp_path / "out", rules={"constant": "keep"})
    np.testing.assert_allclose(
        values_of(tmp_path / "out", "pm25"), small_world().pm25.values[:, ::-1], rtol=1e-5
    )  # the first variable draws the same numbers
    rh = values_of(tmp_path / "out", "rh")
    np.testing.assert_allclose(rh[0, 0, 0], 51.7, atol=0.5)  # 280 K over 290 K: WMO tables give 51.7 %


def test_a_second_call_adds_the_hours_that_are_new_and_refuses_a_changed_past(tmp_path):
    dataset = small_world(100)
    dataset.isel(time=slice(0, 50)).to_netcdf(tmp_path / "data.nc")
    prepared([tmp_path / "data.nc"], tmp_path / "out")
    dataset.to_netcdf(tmp_path / "data.nc")
    prepared([tmp_path / "data.nc"], tmp_path / "out")
    np.testing.assert_array_equal(values_of(tmp_path / "out", "o3", 100), dataset.o3.values[:, ::-1])
    assert len(list((tmp_path / "out").glob("fields_*"))) == 1
    assert main(["prepare", "--verify", str(tmp_path / "out")]) == 0
    dataset["o3"][10, 2, 2] += 1
    dataset.to_netcdf(tmp_path / "data.nc")
    with pytest.raises(Refusal, match="2019-01-01T10 was prepared with values that differ"):
        prepared([tmp_path / "data.nc"], tmp_path / "out")


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        ("mark", r'pm25: .*-999.*drop: \["pm25 == -999"\]'),
        ("cut", "of .* that its header announces: the file was cut"),
        ("gap", r"no data from 2019-01-01T05 to .*longest_gap"),
        ("unit", "pm25: no unit"),
        ("ratio", "mixing ratio.*ratio: 20 degC"),
        ("twice", "times that .* has too.*duplicates: first"),
    ],
)
def test_what_needs_a_decision_is_listed_with_its_line_and_nothing_is_written(tmp_path, damage, found, capsys):
    dataset, folder = small_world(), tmp_path / "in"
    folder.mkdir()
    form = "NETCDF3_64BIT" if damage == "cut" else "NETCDF4"
    if damage == "mark":
        dataset["pm25"][5:30, 2, 2] = -999.0
    elif damage == "gap":
        time = dataset.time.values.copy()
        time[6:] += np.timedelta64(40, "D")
        dataset = dataset.assign_coords(time=time)
    elif damage == "unit":
        del dataset.pm25.attrs["units"]
    elif damage == "ratio":
        dataset["o3"].attrs["units"] = "ppb"
    elif damage == "twice":
        dataset.to_netcdf(folder / "again.nc")
    dataset.to_netcdf(folder / "data.nc", format=form)
    if damage == "cut":
        content = (folder / "data.nc").read_bytes()
        (folder / "data.nc").write_bytes(content[: len(content) * 8 // 10])
    assert main(["prepare", str(folder), "--check"]) == 1
    assert re.search(found, capsys.readouterr().out)
    assert main(["prepare", str(folder), "-o", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_a_rule_drops_values_and_the_report_counts_them_by_year(tmp_path):
    dataset = small_world()
    dataset["pm25"][5:30, 2, 2] = -999.0
    dataset.to_netcdf(tmp_path / "data.nc")
    prepared([tmp_path / "data.nc"], tmp_path / "out", rules={"drop": ("pm25 == -999",)})
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert list(report["dropped"].values()) == [{"2019": 25}]
    assert np.isnan(values_of(tmp_path / "out", "pm25")[5:30, 5, 2]).all()


def test_stations_are_averaged_in_cells_and_each_counts_once_over_all_files(tmp_path):
    draw = np.random.default_rng(1)
    time = np.datetime64("2019-01-01", "ns") + np.arange(48) * np.timedelta64(1, "h")
    lat, lon = np.array([-17.7, -17.6, -18.6]), np.array([178.4, 178.3, -179.2])
    values = draw.gamma(4.0, 10.0, (48, 3))
    stations = xr.Dataset(
        {"pm25": (("time", "station"), values, {"units": "ug m-3"})},
        coords={"time": time, "lat": ("station", lat), "lon": ("station", lon), "station": ["a", "b", "c"]},
    )
    for k in range(2):
        stations.isel(time=slice(24 * k, 24 * k + 24)).to_netcdf(tmp_path / f"{k}.nc")
    done = prepared([tmp_path / "0.nc", tmp_path / "1.nc"], tmp_path / "out")
    assert "3 stations, 3 of them in 2 cells" in "\n".join(done.lines)
    cells = values_of(tmp_path / "out", "pm25", 48)
    assert cells.shape[2] <= 4  # not round the world
    np.testing.assert_allclose(np.nanmax(cells[:, 0], axis=1), values[:, :2].mean(axis=1), rtol=1e-6)


def test_fields_on_a_coarser_grid_are_means_by_area(tmp_path):
    dataset = small_world()
    dataset.to_netcdf(tmp_path / "data.nc")
    (tmp_path / "recipe.yaml").write_text("sources: [{path: data.nc}]\ngrid: {shape: [4, 3]}\n")
    prepare(load_recipe([str(tmp_path / "recipe.yaml")]), tmp_path / "out", progress=False)
    found = values_of(tmp_path / "out", "o3")
    values = dataset.o3.values[:, ::-1].astype(float)
    edges = np.linspace(37.5, 29.5, 9)
    area = -np.diff(np.sin(np.deg2rad(edges)))[:, None] * np.ones(6)
    weight = np.where(np.isnan(values), 0, area)
    blocks = [np.nan_to_num(values) * weight, weight]
    total, sums = (b.reshape(-1, 4, 2, 3, 2).sum(axis=(2, 4)) for b in blocks)
    np.testing.assert_allclose(found, total / sums, rtol=1e-6)


def test_a_misspelt_key_names_the_nearest(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("sources: [{path: data.nc, time_zon: UTC}]\n")
    assert main(["prepare", str(tmp_path / "recipe.yaml"), "--check"]) == 2
    assert "'time_zon' is no key of a recipe here (nearest: time_zone)" in capsys.readouterr().err


@pytest.mark.skipif(SHARED is None, reason="TOPOFLOW_SHARED is not set")
def test_cell_means_of_the_chinese_network_are_those_of_pandas(tmp_path):
    raw = Path(SHARED) / "data/raw"
    recipe = Path(__file__).parents[2] / "configs/recipes/cnemc.yaml"
    (tmp_path / "recipe.yaml").write_text(recipe.read_text().replace("degrees: 0.5", "degrees: 1"))
    for file in raw.glob("china_*"):
        (tmp_path / file.name).symlink_to(file)
    done = prepare(load_recipe([str(tmp_path / "recipe.yaml")]), tmp_path / "out", progress=False)
    assert done.is_decided, done.lines
    frames = [pd.read_csv(path) for path in sorted(raw.glob("china_sites_*"))]
    rows = pd.concat(frames).query("type == 'CO'").melt(["date", "hour", "type"], var_name="id").dropna()
    places = pd.read_csv(raw / "china_stations.csv").set_axis(["id", "name", "city", "lon", "lat"], axis=1)
    places[["lat", "lon"]] = places[["lat", "lon"]].apply(pd.to_numeric, errors="coerce")
    rows = rows.merge(places.dropna(subset=["lat", "lon"]).drop_duplicates("id"), on="id")
    local = pd.to_datetime(rows.date.astype(str)) + pd.to_timedelta(rows.hour, unit="h")
    cells = rows.assign(
        time=local - pd.Timedelta("8h"), south=np.floor(rows.lat + 1e-9), west=np.floor(rows.lon + 1e-9)
    )
    expected = cells.groupby(["time", "south", "west"])["value"].mean() * 1000
    source = open_prepared(tmp_path / "out")
    found = source.read("co", np.arange(len(source.times)))
    assert np.isfinite(found).sum() == len(expected)
    rows_of, columns_of = source.grid.lat2d[:, 0] - 0.5, source.grid.lon2d[0] - 0.5
    times = source.times.astype("datetime64[ns]")
    for (time, south, west), value in expected.sample(500, random_state=0).items():
        at = (
            np.searchsorted(times, np.datetime64(time)),
            np.argmin(abs(rows_of - south)),
            np.argmin(abs(columns_of - west)),
        )
        np.testing.assert_allclose(found[at], value, rtol=1e-6)


def test_a_concentration_that_is_far_too_small_is_not_written(tmp_path, capsys):
    dataset = small_world()
    dataset["pm25"] = (dataset.pm25 * 1e-9).assign_attrs(units="ug m-3")
    dataset.to_netcdf(tmp_path / "data.nc")
    assert main(["prepare", str(tmp_path / "data.nc"), "-o", str(tmp_path / "out")]) == 2
    assert re.search(r"decision .*pm25: .*units: \{pm25: .*kg m-3", capsys.readouterr().out)
    assert not (tmp_path / "out").exists()


def test_days_that_another_recipe_wrote_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("topoflow.tools.prepare.joined._BLOCK_BYTES", 1)  # one day at a time
    dataset = small_world(names=("pm25",))
    expected = dataset.pm25.values[:, ::-1].copy()
    dataset["pm25"] = dataset.pm25 / 1000  # in mg m-3, which no attribute says
    dataset["pm25"][55, 2, 2] = -999.0
    dataset.to_netcdf(tmp_path / "data.nc")
    source = recipe_of_paths([str(tmp_path / "data.nc")]).sources[0]
    wrong = replace_rules(Recipe((dataclasses.replace(source, units={"pm25": "ug m-3"}),)))
    right = replace_rules(
        Recipe((dataclasses.replace(source, units={"pm25": "mg m-3"}),)), rules={"drop": ("any == -999",)}
    )
    assert not prepare(wrong, tmp_path / "out", progress=False).is_decided
    wrong = replace_rules(wrong, rules={"drop": ("any == -999",)})
    assert prepare(right, tmp_path / "out", progress=False).is_decided
    expected[55, 5, 2] = np.nan
    np.testing.assert_allclose(values_of(tmp_path / "out", "pm25"), expected, rtol=1e-6)
    with pytest.raises(Refusal, match="was prepared with values that differ"):
        prepare(wrong, tmp_path / "out", progress=False)


def test_two_stations_of_one_name_are_refused(tmp_path):
    time = np.datetime64("2019-01-01", "ns") + np.arange(24) * np.timedelta64(1, "h")
    for k in range(2):  # two networks whose names are numbers
        stations = xr.Dataset(
            {"pm25": (("time", "station"), np.random.default_rng(k).gamma(4.0, 10.0, (24, 2)), {"units": "ug m-3"})},
            coords={"time": time, "lat": ("station", [30.2 + k, 31.2 + k]), "lon": ("station", [110.5, 111.5])},
        )
        stations.assign_coords(station=[0, 1]).to_netcdf(tmp_path / f"{k}.nc")
    recipe = recipe_of_paths([str(tmp_path / "0.nc"), str(tmp_path / "1.nc")])
    done = prepare(recipe, tmp_path / "out", progress=False)
    assert not done.is_decided
    assert re.search(r"error .*1\.nc: .*stations are elsewhere in other files, the first 0", "\n".join(done.lines))


def test_one_table_is_read_as_each_source_says(tmp_path):
    frame = pd.DataFrame(
        {"time": pd.date_range("2019-01-01", periods=24, freq="h"), "station": "a", "lat": 30.5, "lon": 110.5}
    )
    frame["first"], frame["second"] = np.arange(24.0) + 10, np.arange(24.0) + 50
    frame.to_csv(tmp_path / "table.csv", index=False)
    source = recipe_of_paths([str(tmp_path / "table.csv")]).sources[0]
    sources = [
        dataclasses.replace(source, names={ours: theirs}, units={ours: "ug m-3"}, stamp=stamp)
        for ours, theirs, stamp in (("pm25", "first", "end"), ("o3", "second", "start"))
    ]
    grid = GridSpec(degrees=1.0, box=(30.0, 32.0, 110.0, 112.0))
    done = prepare(Recipe(tuple(sources), grid), tmp_path / "out", progress=False)
    assert done.is_decided, done.lines
    found = values_of(tmp_path / "out", "o3", 25)
    np.testing.assert_allclose(np.nanmax(found.reshape(25, -1), axis=1)[1:], frame["second"])


def test_check_prints_all_findings(tmp_path, capsys):
    for k in range(50):
        (tmp_path / f"part{k:02}.nc").write_bytes(b"GRIB")
    assert main(["prepare", str(tmp_path / "part*.nc"), "--check"]) == 1
    assert sum("is GRIB" in line for line in capsys.readouterr().out.splitlines()) == 50
    assert main(["prepare", str(tmp_path / "part*.nc"), "-o", str(tmp_path / "out")]) == 2
    assert "--check prints all" in capsys.readouterr().out
