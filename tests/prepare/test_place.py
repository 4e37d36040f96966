"""Places: grids come out north first and west to east, stations without positions that cannot be."""

import os
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from numpy.typing import ArrayLike

from topoflow.tools.prepare.findings import Findings
from topoflow.tools.prepare.place import Place, read_place
from topoflow.tools.prepare.recipe import Source

SOURCE = Source(path="x.nc")
LAT, LON = np.array([30.0, 31.0, 32.0, 33.0]), np.array([110.0, 112.0, 114.0])


def rectilinear(lat: ArrayLike = LAT, lon: ArrayLike = LON, names=("lat", "lon")) -> xr.Dataset:
    """A field whose value at each cell is 1000 lat + lon (lon in 0..360)."""
    lat, lon = np.asarray(lat, float), np.asarray(lon, float)
    values = 1000 * lat[:, None] + lon % 360
    return xr.Dataset({"pm25": (names, values)}, coords={names[0]: lat, names[1]: lon})


def place_of(dataset: xr.Dataset, source: Source = SOURCE, **options) -> Place:
    findings = Findings()
    place = read_place(dataset, source, findings, "x.nc", **options)
    assert place is not None, [finding.line() for finding in findings.sorted()]
    return place


def finding_of(dataset: xr.Dataset, source: Source = SOURCE, severity: str = "error") -> str:
    findings = Findings()
    assert read_place(dataset, source, findings, "x.nc") is None
    (finding,) = findings.sorted()
    assert finding.severity == severity
    return finding.line()


def assert_turned(dataset: xr.Dataset, place: Place) -> None:
    """Rows north first, columns west to east, and each value at the cell that it was at in the file."""
    assert (np.diff(place.lat, axis=0) < 0).all()
    assert (np.diff(place.lon, axis=1) > 0).all()
    field = dataset["pm25"]
    np.testing.assert_allclose(place.turn(field.values, field.dims), 1000 * place.lat + place.lon % 360)


@pytest.mark.parametrize("lon", [LON, LON[::-1]])
@pytest.mark.parametrize("lat", [LAT, LAT[::-1]])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_rows_and_columns_come_out_in_one_order(lat, lon, is_transposed):
    dataset = rectilinear(lat, lon)
    dataset = dataset.transpose("lon", "lat") if is_transposed else dataset
    place = place_of(dataset)
    assert place.kind == "grid"
    assert place.shape == (4, 3)
    assert_turned(dataset, place)


def test_a_square_mask_is_turned_like_the_fields():
    lat, lon = np.arange(30.0, 34.0), np.arange(110.0, 114.0)
    fields = place_of(rectilinear(lat, lon))
    is_south = np.zeros((4, 4), bool)
    is_south[3] = True  # rows run from north to south
    mask = xr.Dataset(
        {"mask": (("latitude", "longitude"), is_south)}, coords={"latitude": lat[::-1], "longitude": lon}
    ).transpose("longitude", "latitude")
    place = place_of(mask)
    assert place.is_same(fields)
    np.testing.assert_array_equal(place.turn(mask["mask"].values, mask["mask"].dims), fields.lat == 30)


def test_other_dimensions_stay_in_front_in_their_order():
    dataset = rectilinear().expand_dims(time=5, level=2).transpose("lon", "time", "lat", "level")
    place = place_of(dataset)
    turned = place.turn(dataset["pm25"].values, dataset["pm25"].dims)
    assert turned.shape == (5, 2, 4, 3)
    np.testing.assert_array_equal(turned[3, 1], 1000 * place.lat + place.lon)


@pytest.mark.parametrize(
    ("lon", "expected"),
    [
        ([356, 357, 358, 359, 0, 1, 2], [-4, -3, -2, -1, 0, 1, 2]),
        ([335.05, 335.15, 359.95, 0.05], None),
        ([178, 179, -180, -179], [178, 179, 180, 181]),
        ([2, 1, 0, 359], [-1, 0, 1, 2]),
        ([0, 1, 2, 358, 359], [-2, -1, 0, 1, 2]),
        ([200, 210, 220], [-160, -150, -140]),
        (range(0, 360, 10), range(0, 360, 10)),
        (range(-180, 180, 10), range(-180, 180, 10)),
        ([*range(0, 180, 10), *range(-180, 0, 10)], range(0, 360, 10)),
        (range(350, -1, -10), range(0, 360, 10)),
    ],
)
def test_longitudes_do_not_jump(lon, expected):
    dataset = rectilinear(lon=list(lon))
    place = place_of(dataset)
    assert_turned(dataset, place)
    if expected is not None:
        np.testing.assert_array_equal(place.lon[0], list(expected))


@pytest.mark.parametrize(
    "names", [("latitude", "longitude"), ("nav_lat", "nav_lon"), ("LAT", "LON"), ("XLAT", "XLONG")]
)
def test_usual_names_are_known(names):
    dataset = rectilinear(names=names)
    assert_turned(dataset, place_of(dataset))


@pytest.mark.parametrize(
    ("attrs_lat", "attrs_lon"),
    [
        ({"units": "degrees_north"}, {"units": "degrees_east"}),
        ({"standard_name": "latitude"}, {"standard_name": "longitude"}),
        ({"long_name": "latitude"}, {"long_name": "longitude"}),
    ],
)
def test_attributes_say_what_a_coordinate_is(attrs_lat, attrs_lon):
    dataset = rectilinear(names=("y", "x"))
    dataset["y"].attrs, dataset["x"].attrs = attrs_lat, attrs_lon
    assert_turned(dataset, place_of(dataset))


def test_names_of_the_recipe_come_first():
    dataset = rectilinear(names=("a", "b"))
    assert "names: {lat: NAME, lon: NAME}" in finding_of(dataset, severity="decision")
    assert_turned(dataset, place_of(dataset, Source(path="x.nc", names={"lat": "a", "lon": "b"})))
    assert "'c'" in finding_of(dataset, Source(path="x.nc", names={"lat": "c", "lon": "b"}), "decision")


def curvilinear(**dims) -> xr.Dataset:
    """A rotated grid of 4 x 5 cells, coordinates over (y, x) or more dimensions."""
    j, i = np.meshgrid(np.arange(4.0), np.arange(5.0), indexing="ij")
    lat, lon = 40 - j + 0.1 * i, 178 + i + 0.1 * j
    lon = (lon + 180) % 360 - 180
    coordinates = {"lat": (("y", "x"), lat), "lon": (("y", "x"), lon)}
    return xr.Dataset({"pm25": (("y", "x"), 1000 * lat + lon % 360), **coordinates})


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("flip", [{}, {"y": -1}, {"x": -1}, {"y": -1, "x": -1}])
def test_coordinates_of_two_dimensions(flip, is_transposed):
    dataset = curvilinear().isel({dim: slice(None, None, step) for dim, step in flip.items()})
    dataset = dataset.transpose("x", "y") if is_transposed else dataset
    place = place_of(dataset)
    assert place.dims == ("y", "x")
    assert_turned(dataset, place)


def test_coordinates_that_repeat_over_time_are_taken_once():
    dataset = curvilinear().rename(lat="XLAT", lon="XLONG").expand_dims(Time=3)
    assert dataset["XLAT"].dims == ("Time", "y", "x")
    place = place_of(dataset)
    assert place.dims == ("y", "x")
    np.testing.assert_allclose(
        place.turn(dataset["pm25"].values, dataset["pm25"].dims)[2], 1000 * place.lat + place.lon % 360
    )


def test_coordinates_that_change_over_time_are_refused():
    dataset = curvilinear().expand_dims(Time=100)
    dataset["lat"] = dataset["lat"] + xr.DataArray([0.0] * 99 + [1.0], dims="Time")
    assert "lat: changes along dimensions (Time)" in finding_of(dataset)


def test_radians_are_refused_by_name():
    dataset = rectilinear()
    dataset["lat"].attrs["units"] = "radian"
    assert "lat: units 'radian': expected degrees" in finding_of(dataset)


@pytest.mark.parametrize("unit", ["", "degrees_north", "degree_N", "degreesN", "Degrees", "decimal degrees", "°"])
def test_units_of_degrees(unit):
    dataset = rectilinear()
    dataset["lat"].attrs["units"] = unit
    assert_turned(dataset, place_of(dataset))


@pytest.mark.parametrize("unit", ["m", "degC", "degrees_east"])
def test_a_wrong_unit_is_settled_by_the_recipe(unit):
    dataset = rectilinear()
    dataset["lat"].attrs["units"] = unit
    assert "units: {lat: degrees}" in finding_of(dataset, severity="decision")
    assert_turned(dataset, place_of(dataset, Source(path="x.nc", units={"lat": "degrees"})))


@pytest.mark.parametrize(
    ("lat", "lon", "words"),
    [
        ([30, 31, 31.00000001, 32], LON, "two rows at one place"),
        ([30, 31, 32, 30.00000001], LON, "two rows at one place"),
        (LAT, [0, 90, 180, 270, 360], "two columns at one place"),
        ([30, 32, 31, 33], LON, "lat: not monotonic along the rows"),
        (LAT, [110, 114, 112, 116], "lon: not monotonic along the columns"),
        ([30, 31, 91], LON, "lat: 1 of 3 values are not positions (first: 91)"),
        ([30, 31, np.nan], LON, "lat: 1 of 3 values are not positions (first: nan)"),
        (LAT, [110, 112, 1e20], "lon: 1 of 3 values are not positions (first: 1e+20)"),
        ([30], LON, "1 x 3 cells"),
    ],
)
def test_grids_that_cannot_be_are_refused(lat, lon, words):
    assert words in finding_of(rectilinear(lat, lon))


def test_a_projection_without_positions_is_refused():
    dataset = rectilinear(names=("y", "x"))
    dataset["y"].attrs["standard_name"] = "projection_y_coordinate"
    assert "2-D variables lat and lon" in finding_of(dataset, severity="decision")


def test_the_pair_that_variables_are_on_is_taken():
    dataset = rectilinear().assign(lat_corner=("corner", [1.0, 2.0], {"standard_name": "latitude"}))
    dataset["lat"].attrs = {"standard_name": "latitude"}
    assert_turned(dataset, place_of(dataset))


def test_two_pairs_that_fit_are_a_decision():
    dataset = curvilinear().assign({f"{name}_b": (("y", "x"), np.ones((4, 5))) for name in ("lat", "lon")})
    for name, standard in (("lat", "latitude"), ("lon", "longitude")):
        dataset[f"{name}_b"].attrs["standard_name"] = dataset[name].attrs["standard_name"] = standard
    dataset = dataset.rename(lat="lat_a", lon="lon_a")
    assert "several coordinates fit" in finding_of(dataset, severity="decision")


def stations(lat, lon) -> xr.Dataset:
    values = 1000 * np.asarray(lat, float) + np.asarray(lon, float) % 360
    ids = [f"s{i}" for i in range(len(lat))]
    return xr.Dataset(
        {"pm25": (("station", "time"), np.stack([values, values], axis=1))},
        coords={"station": ids, "lat": ("station", lat), "lon": ("station", lon)},
    )


def test_stations_share_one_dimension():
    dataset = stations([-17.7, -18.1, -16.4], [177.45, 178.4, -178.8])
    place = place_of(dataset)
    assert place.kind == "stations"
    assert place.ids == ("s0", "s1", "s2")
    np.testing.assert_allclose(place.lon, [177.45, 178.4, 181.2])
    assert place.turn(dataset["pm25"].values, dataset["pm25"].dims).shape == (2, 3)


@pytest.mark.parametrize("bad", [(-999.0, -999.0), (0.0, 0.0), (np.nan, np.nan), (30.0, 400.0)])
def test_stations_without_a_position(bad):
    dataset = stations([30.0, bad[0], 31.0], [110.0, bad[1], 111.0])
    findings = Findings()
    read_place(dataset, SOURCE, findings, "x.nc")
    (finding,) = findings.sorted()
    assert finding.severity == "decision"
    assert "1 of 3 stations" in finding.found
    assert "s1" in finding.found
    assert finding.settle == "rules: {positions: drop}"
    findings = Findings()
    place = read_place(dataset, SOURCE, findings, "x.nc", positions="drop")
    assert [finding.severity for finding in findings.sorted()] == ["note"]
    assert place is not None
    assert place.ids == ("s0", "s2")
    np.testing.assert_allclose(place.turn(dataset["pm25"].values, dataset["pm25"].dims)[0], [30110, 31111])


def test_a_station_on_the_equator_or_at_greenwich_has_a_position():
    assert place_of(stations([0.0, 51.5], [110.0, 0.0])).ids == ("s0", "s1")


def test_a_single_station_may_have_a_scalar_position():
    dataset = stations([30.0], [110.0]).isel(station=0)
    place = place_of(dataset)
    assert place.ids == ("s0",)
    assert place.turn(dataset["pm25"].values, dataset["pm25"].dims).shape == (2, 1)


def test_a_name_that_two_stations_have_is_a_decision():
    dataset = stations([30.0, 31.0], [110.0, 111.0]).assign_coords(station=["a", "a"])
    assert "occur more than once (first: 'a')" in finding_of(dataset, severity="decision")


def test_the_kind_that_the_recipe_expects_is_checked():
    source = Source(path="x.nc", kind="stations")
    assert "kind: grid" in finding_of(rectilinear(), source, "decision")


def test_same_places_are_known_whatever_their_order():
    place = place_of(rectilinear(lon=LON + 90))
    assert place.is_same(place_of(rectilinear(LAT[::-1], LON + 90 - 360 + 1e-6)))
    assert not place.is_same(place_of(rectilinear(LAT + 0.01)))


@pytest.mark.skipif(
    "TOPOFLOW_SHARED" not in os.environ, reason="TOPOFLOW_SHARED is not set: the real data are not here"
)
def test_real_files_have_places():
    folder = Path(os.environ["TOPOFLOW_SHARED"]) / "data"
    with xr.open_dataset(folder / "terrain_asia_20min.nc") as dataset:
        place = place_of(dataset)
        expected = dataset["elevation"].sortby("lat", ascending=False).transpose("lat", "lon")
        turned = place.turn(dataset["elevation"].values, dataset["elevation"].dims)
        np.testing.assert_array_equal(turned, expected.values)
        np.testing.assert_array_equal(place.lat[:, 0], expected["lat"].values.astype("float64"))
    with xr.open_dataset(folder / "china_cnemc_2019_hourly.nc") as dataset:
        place = place_of(dataset)
        assert place.shape == (1476,)
        assert place.ids == tuple(dataset["station"].values.tolist())
