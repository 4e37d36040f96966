"""Composition of CAMS and weather of ERA5, as their stores write them, through the recipe to a trained model."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import yaml

import train
from topoflow.data.prepared.reader import PreparedData, index_prepared
from topoflow.tools.prepare.command import prepare
from topoflow.tools.prepare.recipe import GridSpec, Recipe, Source, read_recipe

RECIPE = Path(__file__).parents[2] / "configs/recipes/cams_era5.yaml"
DAYS = 10
GAS_CONSTANT, DRY_AIR = 8.314462618, 0.0289647  # J mol-1 K-1 (CODATA 2018), kg mol-1
BOX = (45.375, 51.375, -3.375, 2.625)
"""8 x 8 cells of 0.75 degrees about Greenwich, their centres those of EAC4."""


def series(name, unit, low, high, lat, lon, hours, seed):
    """A field that varies smoothly in time and place between `low` and `high`."""
    draw = np.random.default_rng(seed)
    wave = np.sin(2 * np.pi * hours[:, None, None] / draw.uniform(18, 60) + draw.uniform(0, 6))
    place = np.cos(np.radians(7 * lat[:, None] + 11 * lon))
    noise = draw.uniform(0, 1, (len(hours), len(lat), len(lon)))
    share = 0.25 + 0.25 * wave * place + 0.5 * noise
    values = low + (high - low) * np.clip(share, 0, 1)
    return xr.DataArray(values, dims=("time", "latitude", "longitude"), name=name, attrs={"units": unit})


def write_as_store(fields, path, form, lat, lon, hours):
    """Write fields as the stores do: NetCDF 3 with packed numbers until 2024, and NetCDF 4 since."""
    dataset = xr.Dataset(
        {field.name: field for field in fields},
        {
            "time": np.datetime64("2019-01-01", "ns") + hours * np.timedelta64(1, "h"),
            "latitude": ("latitude", lat.astype("f4"), {"units": "degrees_north", "long_name": "latitude"}),
            "longitude": ("longitude", lon.astype("f4"), {"units": "degrees_east", "long_name": "longitude"}),
        },
        {"Conventions": "CF-1.6"},
    )
    path.parent.mkdir(exist_ok=True)
    if form == "netcdf 3":
        dataset["time"].attrs["long_name"] = "time"
        encoding = {"time": {"units": "hours since 1900-01-01 00:00:00.0", "calendar": "gregorian", "dtype": "i4"}}
        for name, field in dataset.data_vars.items():
            low, high = float(field.min()), float(field.max())
            packing = {"scale_factor": (high - low) / 65532, "add_offset": (high + low) / 2}
            encoding[name] = {"dtype": "i2", "_FillValue": -32767, "missing_value": -32767, **packing}
        dataset.to_netcdf(path, format="NETCDF3_64BIT", encoding=encoding, unlimited_dims=["time"])
        return
    dataset = dataset.rename(time="valid_time")
    dataset["valid_time"].attrs.update(standard_name="time", long_name="time")
    gases = [name for name in ("co", "no2", "so2", "go3", "t") if name in dataset]
    for name in gases:
        dataset[name] = dataset[name].expand_dims(model_level=[60.0], axis=1)
    experiment = np.array(["0001"] * len(hours))
    dataset = dataset.assign_coords(expver=("valid_time", experiment), number=((), 0, {"units": "1"}))
    encoding = {name: {"dtype": "f4", "zlib": True, "complevel": 1} for name in dataset.data_vars}
    times = {"units": "seconds since 1970-01-01", "calendar": "proleptic_gregorian", "dtype": "i8"}
    dataset.to_netcdf(path, encoding={**encoding, "valid_time": times})


def write_era5(folder, form):
    """Hourly, 0.25 degrees, longitudes from -180, as of a request with an area."""
    lat, lon, hours = np.arange(52, 44.9, -0.25), np.arange(-4, 3.1, 0.25), np.arange(24 * DAYS)
    fields = [
        series("u10", "m s**-1", -12, 12, lat, lon, hours, 1),
        series("v10", "m s**-1", -9, 9, lat, lon, hours, 2),
        series("t2m", "K", 275, 300, lat, lon, hours, 3),
        series("d2m", "K", 262, 274, lat, lon, hours, 4),
        series("sp", "Pa", 96000, 102000, lat, lon, hours, 5),
        series("blh", "m", 20, 1800, lat, lon, hours, 6),
        series("tcc", "(0 - 1)", 0, 1, lat, lon, hours, 7),
    ]
    write_as_store(fields, folder / "era5/2019_01.nc", form, lat, lon, hours)
    height = series("z", "m**2 s**-2", -400, 15000, lat, lon, hours[:1], 8)
    write_as_store([height], folder / "era5_geopotential.nc", form, lat, lon, hours[:1])


def write_eac4(folder, form):
    """3-hourly, 0.75 degrees, round the globe from 0, in a file for each half of the days."""
    lat, lon = np.arange(52.5, 44.2, -0.75), np.arange(0, 360, 0.75)
    for number, part in enumerate(np.array_split(np.arange(0, 24 * DAYS, 3), 2)):
        fields = [
            series("pm2p5", "kg m**-3", 2e-9, 9e-8, lat, lon, part, 11),
            series("pm10", "kg m**-3", 4e-9, 2e-7, lat, lon, part, 12),
            series("sp", "Pa", 96000, 102000, lat, lon, part, 13),
            series("t", "K", 275, 300, lat, lon, part, 14),
            series("co", "kg kg**-1", 8e-8, 5e-7, lat, lon, part, 15),
            series("no2", "kg kg**-1", 1e-10, 3e-8, lat, lon, part, 16),
            series("so2", "kg kg**-1", 1e-10, 2e-8, lat, lon, part, 17),
            series("go3", "kg kg**-1", 2e-8, 1.2e-7, lat, lon, part, 18),
        ]
        write_as_store(fields, folder / f"cams/eac4_{number}.nc", form, lat, lon, part)


def recipe_at(folder, **changes) -> Recipe:
    """The recipe as it is shipped, with the paths and the box of these files, and one more name."""
    shipped = read_recipe(RECIPE)
    era5, cams = shipped.sources
    assert (era5.path, cams.path) == (str(RECIPE.parent / "era5/*.nc"), str(RECIPE.parent / "cams/*.nc"))
    sources: tuple[Source, ...] = (
        dataclasses.replace(era5, path=str(folder / "era5/*.nc"), names={"cloud_cover": "tcc"}),
        dataclasses.replace(cams, path=str(folder / "cams/*.nc")),
    )
    grid = dataclasses.replace(shipped.grid, box=BOX)
    elevation = str(folder / "era5_geopotential.nc")
    return dataclasses.replace(shipped, **{"sources": sources, "elevation": elevation, "grid": grid, **changes})


def as_xarray_reads(folder, pattern):
    """All files, decoded by xarray, on (time, latitude, longitude) with longitudes from -180."""
    parts = []
    for path in sorted(folder.glob(pattern)):
        part = xr.load_dataset(path)
        parts.append(part.rename(valid_time="time") if "valid_time" in part.dims else part)
    dataset = xr.concat(parts, "time", data_vars="all", coords="minimal", compat="override")
    dataset = dataset.drop_vars(["expver", "number"], errors="ignore")
    if "model_level" in dataset.dims:
        dataset = dataset.isel(model_level=0, drop=True)
    return dataset.assign_coords(longitude=(dataset.longitude + 180) % 360 - 180).sortby("longitude").astype("f8")


def inside(field):
    """The cells of BOX, north first."""
    south, north, west, east = BOX
    return field.sel(latitude=slice(north, south), longitude=slice(west, east)).transpose("time", ...).values


def means_of_nine(field):
    """Means of 3 x 3 cells of 0.25 degrees by area: those of one row of such cells are equally large."""
    values = inside(field)
    edges = np.linspace(BOX[1], BOX[0], values.shape[1] + 1)
    area = -np.diff(np.sin(np.deg2rad(edges)))[:, None] * np.ones(values.shape[2])
    total, weight = ((v).reshape(-1, 8, 3, 8, 3).sum(axis=(2, 4)) for v in (values * area, area[None]))
    return total / weight


@pytest.fixture(scope="module", params=["netcdf 3", "netcdf 4"])
def prepared_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_era5(folder, request.param)
    write_eac4(folder, request.param)
    done = prepare(recipe_at(folder), folder / "out", progress=False)
    assert done.is_decided, done.lines
    return folder


def test_composition_and_weather_are_those_that_xarray_reads(prepared_folder):
    data = PreparedData(index_prepared(str(prepared_folder / "out")))
    count = 8 * DAYS
    assert data.step_hours == 3
    np.testing.assert_array_equal(data.times, np.arange("2019-01-01T00", "2019-01-11T00", 3, "M8[h]"))
    found = {name: data.read(name, np.arange(count)) for name in data.dynamic}
    np.testing.assert_allclose(data.grid.lon2d[0], np.arange(-3, 2.3, 0.75), atol=1e-4)
    np.testing.assert_allclose(data.grid.lat2d[:, 0], np.arange(51, 45.7, -0.75), atol=1e-4)

    cams = as_xarray_reads(prepared_folder, "cams/*.nc")
    density = cams.sp * DRY_AIR / (GAS_CONSTANT * cams.t)  # kg m-3
    for ours, theirs in (("co", "co"), ("no2", "no2"), ("so2", "so2"), ("o3", "go3")):
        np.testing.assert_allclose(found[ours], inside(cams[theirs] * density * 1e9), rtol=1e-4, err_msg=ours)
    for ours, theirs in (("pm25", "pm2p5"), ("pm10", "pm10")):
        np.testing.assert_allclose(found[ours], inside(cams[theirs] * 1e9), rtol=1e-5, err_msg=ours)

    era5 = as_xarray_reads(prepared_folder, "era5/*.nc").isel(time=slice(0, None, 3))
    names = {"u": "u10", "v": "v10", "temp": "t2m", "psfc": "sp", "blh": "blh", "cloud_cover": "tcc"}
    for ours, theirs in names.items():
        np.testing.assert_allclose(found[ours], means_of_nine(era5[theirs]), rtol=1e-5, atol=1e-5, err_msg=ours)
    pressure = {name: 611.2 * np.exp(17.67 * (era5[name] - 273.15) / (era5[name] - 29.65)) for name in ("d2m", "t2m")}
    humidity = means_of_nine(100 * pressure["d2m"] / pressure["t2m"])  # Bolton 1980, equation 10
    np.testing.assert_allclose(found["rh"], humidity, rtol=0.01)

    height = as_xarray_reads(prepared_folder, "era5_geopotential.nc")
    np.testing.assert_allclose(data.static("elevation"), means_of_nine(height.z / 9.80665)[0], rtol=1e-5, atol=1e-3)
    units = {name: data.units[name] for name in ("pm25", "blh", "cloud_cover")}
    assert units == {"pm25": "ug m-3", "blh": "m", "cloud_cover": "(0 - 1)"}


def test_a_model_is_trained_on_them_with_leads_of_three_hours(prepared_folder, tmp_path):
    weather = ["u", "v", "temp", "rh", "psfc", "blh", "cloud_cover"]
    config = {
        "run": {"dir": str(tmp_path / "run"), "seed": 0, "threads": 1},
        "data": {
            "path": str(prepared_folder / "out"),
            "train": [["2019-01-01", "2019-01-06"]],
            "validation": [["2019-01-07", "2019-01-08"]],
            "test": [["2019-01-09", "2019-01-10T21"]],
            "variables": [*weather, "pm25", "pm10", "so2", "no2", "co", "o3", "elevation", "hour_sin", "hour_cos"],
            "hours": {"blh": [0, 3, 6], "cloud_cover": [0, 6]},
            "lead_times_hours": [3, 6, 24],
            "threads": 0,
        },
        "model": {"patch_size": 2, "embed_dim": 16, "depth": 1, "decoder_depth": 1, "num_heads": 2, "wind": "rank"},
        "train": {
            "max_steps": 3,
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "validate_every_steps": 3,
            "log_every_steps": 1,
        },
        "checkpoint": {"every_steps": 3},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert train.main([str(tmp_path / "config.yaml")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "train"] == [1, 2, 3]
    scores = json.loads((tmp_path / "run/evaluation/scores.json").read_text())
    records = scores if isinstance(scores, list) else scores["records"]
    assert {record["lead_hours"] for record in records} == {3, 6, 24}
    assert all(np.isfinite(record["rmse"]) and record["n"] for record in records)
    assert {record["target"]: record["unit"] for record in records}["co"] == "mg m-3"


def test_european_analyses_with_their_own_time_and_longitudes(tmp_path):
    write_era5(tmp_path, "netcdf 4")
    lat, lon = np.arange(51.95, 44.9, -0.1), np.arange(356.05, 364, 0.1) % 360
    expected = []
    for day in range(2):
        hours = np.arange(24)
        field = series("pm2p5_conc", "µg/m3", 2, 80, lat, lon, hours + 24 * day, 21)
        field = field.expand_dims(level=[0.0], axis=1).astype("f4")
        field.attrs = {"species": "PM2.5 Aerosol", "units": "µg/m3", "value": "hourly values"}
        field.attrs["standard_name"] = "mass_concentration_of_pm2p5_ambient_aerosol_in_air"
        field[5, 0, 5:10, 5:30] = np.nan  # five cells of the target
        dataset = xr.Dataset(
            {"pm2p5_conc": field},
            {
                "longitude": ("longitude", lon.astype("f4"), {"units": "degrees_east"}),
                "latitude": ("latitude", lat.astype("f4"), {"units": "degrees_north"}),
                "level": ("level", [0.0], {"units": "m", "positive": "up"}),
                "time": (
                    "time",
                    hours.astype("f4"),
                    {"units": "hours", "long_name": f"ANALYSIS time from 2019010{day + 1}"},
                ),
            },
        )
        path = tmp_path / f"cams/{day}.nc"
        path.parent.mkdir(exist_ok=True)
        dataset.to_netcdf(path, encoding={"pm2p5_conc": {"_FillValue": -999.0}}, unlimited_dims=["time"])
        expected.append(field.values[:, 0])
    grid = GridSpec(degrees=0.5, box=(45.0, 51.5, -3.5, 3.0))
    recipe = recipe_at(tmp_path, grid=grid, frequency="1h")
    done = prepare(recipe, tmp_path / "out", progress=False)
    assert done.is_decided, done.lines
    data = PreparedData(index_prepared(str(tmp_path / "out")))
    found = data.read("pm25", np.arange(48))
    values = np.concatenate(expected).astype("f8")[:, 5:70, 5:70]
    edges = np.linspace(51.5, 45.0, 66)
    area = np.broadcast_to(-np.diff(np.sin(np.deg2rad(edges)))[:, None], values.shape[1:])
    weight = np.where(np.isnan(values), 0, area)
    total, share = (v.reshape(-1, 13, 5, 13, 5).sum(axis=(2, 4)) for v in (np.nan_to_num(values) * weight, weight))
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(found, total / share, rtol=1e-4)  # the file's coordinates are float32
    assert np.isnan(found).sum() == 2 * 5
    assert np.isfinite(data.read("blh", np.arange(48))).all()
