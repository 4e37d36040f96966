"""Back trajectories compared with exact solutions on the sphere, and interpolation with xarray's."""

import numpy as np
import pytest
import xarray as xr

from topoflow.errors import ConfigError
from topoflow.physics.advection import EARTH_RADIUS_M, IndexSpace, interpolate, trace_back

LAT, LON = np.linspace(50, 30, 41), np.linspace(165, 195, 61) % 360 - 360 * (np.linspace(165, 195, 61) > 180)
"""Half a degree apart, across the date line, with longitudes from -180 to 180."""
LEADS = (6, 24)


def unit_vectors(lat, lon):
    """Unit vectors [..., 3] to places given in degrees."""
    phi, turn = np.deg2rad(lat), np.deg2rad(lon)
    return np.stack([np.cos(phi) * np.cos(turn), np.cos(phi) * np.sin(turn), np.sin(phi)], axis=-1)


def wind_of_rotation(lat2d, lon2d, axis_per_hour):
    """u, v in m/s, [2, H, W], of a rotation of the whole sphere by the vector `axis_per_hour`, radians an hour."""
    place, turn = unit_vectors(lat2d, lon2d), np.deg2rad(lon2d)
    motion = EARTH_RADIUS_M / 3600 * np.cross(axis_per_hour, place)
    east = np.stack([-np.sin(turn), np.cos(turn), np.zeros_like(turn)], axis=-1)
    return np.stack([(motion * east).sum(-1), (motion * np.cross(place, east)).sum(-1)])


def rotated(place, vector):
    """Unit vectors [..., 3] turned by a rotation vector (Rodrigues' formula)."""
    angle = np.linalg.norm(vector)
    axis = vector / angle
    parallel = (place @ axis)[..., None] * axis
    return parallel + np.cos(angle) * (place - parallel) + np.sin(angle) * np.cross(axis, place)


def errors_of_rotation(lat2d, lon2d, space, step_hours):
    """Largest distance in degrees, per lead, between found and exact origins of air that was always inside the grid."""
    axis_per_hour = np.deg2rad(0.9) * unit_vectors(52.0, 178.0)
    wind = wind_of_rotation(lat2d, lon2d, axis_per_hour)
    wind = np.stack([wind, wind])
    positions, _ = trace_back(space, LEADS, (0, 24), wind, step_hours=step_hours)
    hourly, _ = trace_back(space, range(1, 25), (0, 24), wind)
    places = unit_vectors(lat2d, lon2d)
    found = np.moveaxis(interpolate(space, np.moveaxis(places, -1, 0), positions), 0, -1)
    found /= np.linalg.norm(found, axis=-1, keepdims=True)
    edges = np.array(space.shape[::-1])[:, None, None, None] - 1
    inner = np.logical_and.accumulate(((hourly > 0.5) & (hourly < edges - 0.5)).all(axis=0), axis=0)
    errors = []
    for k, lead in enumerate(LEADS):
        exact, counts = rotated(places, -lead * axis_per_hour), inner[lead - 1]
        assert np.mean(counts) > 0.3
        errors.append(np.rad2deg(np.linalg.norm(found[k] - exact, axis=-1)[counts].max()))
    return np.array(errors)


def test_the_error_of_a_rotation_of_the_sphere_falls_with_the_square_of_the_step():
    lat2d, lon2d = np.meshgrid(LAT, LON, indexing="ij")
    space = IndexSpace(LAT, LON)
    errors = np.stack([errors_of_rotation(lat2d, lon2d, space, step) for step in (6, 3, 1.5)])
    # the distance of air from the axis is up to 20 degrees: it turns by 5.4 and 21.6 degrees about it
    assert (errors[1] < (0.001, 0.004)).all(), errors
    assert (errors[:-1, 1] / errors[1:, 1] > 3).all(), errors  # over 6 h, most is due to bilinear winds


def test_a_curvilinear_grid_gives_the_same_origins():
    # half a degree apart in coordinates whose pole lies elsewhere
    x, y = np.meshgrid(np.deg2rad(np.linspace(-12, 12, 49)), np.deg2rad(np.linspace(9, -9, 37)))
    there = np.stack([np.cos(y) * np.cos(x), np.cos(y) * np.sin(x), np.sin(y)], axis=-1)
    turned = rotated(rotated(rotated(there, np.deg2rad([25, 0, 0])), np.deg2rad([0, -40, 0])), np.deg2rad([0, 0, 180]))
    lat2d, lon2d = np.rad2deg(np.arcsin(turned[..., 2])), np.rad2deg(np.arctan2(turned[..., 1], turned[..., 0]))
    assert (errors_of_rotation(lat2d, lon2d, IndexSpace(lat2d, lon2d), 0.75) < (0.005, 0.02)).all()


def test_a_wind_along_a_latitude_moves_each_row_by_its_own_number_of_columns():
    space, wind = IndexSpace(LAT, LON), np.zeros((3, 2, 41, 61))
    wind[:, 0] = np.array([4.0, 10.0, -2.0])[:, None, None]  # at 0, 10 and 30 hours
    (columns, rows), _ = trace_back(space, LEADS, (0, 10, 30), wind, step_hours=3)
    north_first = np.indices((41, 61))
    for k, ms_hours in enumerate((6 * (4 + 7.6) / 2, 10 * 7 + 14 * (10 + 1.6) / 2)):  # integrals of the wind
        degrees = np.rad2deg(3600 * ms_hours / (EARTH_RADIUS_M * np.cos(np.deg2rad(LAT))))[:, None]
        expected = np.maximum(north_first[1] - degrees / 0.5, 0)  # at the edge, it comes from there
        np.testing.assert_allclose(columns[k], expected, atol=1e-9)
        np.testing.assert_allclose(rows[k], north_first[0], atol=1e-12)


def test_air_from_beyond_an_edge_comes_from_the_edge():
    wind = np.broadcast_to(np.array([-30.0, 20.0])[:, None, None], (2, 2, 41, 61))
    (columns, rows), _ = trace_back(IndexSpace(LAT, LON), (96,), (0, 96), wind)
    assert (columns == 60).all()
    assert (rows == 40).all()  # a wind from the south: the last row


@pytest.mark.parametrize("u", [-25.0, 25.0])
def test_air_goes_around_a_globe(u):
    lat, lon = np.linspace(60, -60, 13), np.arange(0, 360, 5.0)
    space, wind = IndexSpace(lat, lon), np.zeros((2, 2, 13, 72), np.float32)
    wind[:, 0] = u * np.cos(np.deg2rad(lat))[:, None]
    positions, _ = trace_back(space, (96,), (0, 96), wind)
    turn = np.rad2deg(3600 * 96 * u / EARTH_RADIUS_M)
    came_from = (lon - turn) % 360
    expected = np.interp(came_from, np.append(lon, 360), np.cos(np.deg2rad(np.append(lon, 360))))
    field = np.broadcast_to(np.cos(np.deg2rad(lon)), (1, 13, 72)).astype(np.float32)
    np.testing.assert_allclose(interpolate(space, field, positions)[0, 0], np.tile(expected, (13, 1)), atol=1e-4)
    assert not IndexSpace(lat, lon[:-1]).closed


def test_interpolation_is_that_of_xarray_and_leaves_missing_values_out():
    rng = np.random.default_rng(0)
    fields = rng.normal(size=(2, 7, 10))
    space = IndexSpace(np.linspace(40, 34, 7), np.linspace(100, 109, 10))
    positions = rng.uniform(0, 1, (2, 3, 7, 10)) * np.array([9, 6])[:, None, None, None]
    columns, rows = (xr.DataArray(values, dims=("lead", "y", "x")) for values in positions)
    array: xr.DataArray = xr.DataArray(
        fields, dims=("field", "row", "column"), coords={"row": range(7), "column": range(10)}
    )
    expected = array.interp(row=rows, column=columns).transpose("field", "lead", "y", "x")
    np.testing.assert_allclose(interpolate(space, fields, positions), expected, atol=1e-12)

    fields[:, 2:4, 3:6] = np.nan
    weight = array.notnull().astype(float).interp(row=rows, column=columns)
    total = array.fillna(0.0).interp(row=rows, column=columns)
    found = interpolate(space, fields, positions)
    np.testing.assert_allclose(found, (total / weight).where(weight > 0).transpose("field", *columns.dims), atol=1e-9)
    assert np.isnan(found).any()


def test_the_mean_along_a_path_of_a_field_that_rises_to_the_east_is_that_of_its_middle():
    wind = np.broadcast_to(np.array([8.0, 0.0])[:, None, None], (2, 2, 41, 61))
    rising = np.broadcast_to(np.arange(61.0), (41, 61))
    gap = np.where(np.arange(61) < 50, rising, np.nan)
    (columns, _), means = trace_back(IndexSpace(LAT, LON), LEADS, (0, 24), wind, np.stack([rising, gap]))
    middle, inner = (columns + np.arange(61)) / 2, columns > 0
    np.testing.assert_allclose(means[0][inner], middle[inner], rtol=1e-12)
    np.testing.assert_allclose(means[1][inner & (rising < 49)], middle[inner & (rising < 49)], rtol=1e-12)
    assert np.isnan(means[1][0, :, -1]).all()  # six hours of 8 m/s are less than ten columns
    assert (means[1][0, :, 50] < 50).all()


def test_without_wind_air_stays_where_it_is_to_the_bit():
    rng = np.random.default_rng(1)
    space = IndexSpace(np.linspace(40, 34, 7), np.linspace(100, 109.3, 10))
    field, still = rng.normal(30, 9, (1, 7, 10)).astype(np.float32), np.zeros((3, 2, 7, 10), np.float32)
    positions, means = trace_back(space, (7, 96), (0, 5, 96), still, field)
    np.testing.assert_array_equal(means[0].astype(np.float32), np.repeat(field, 2, axis=0))
    field[0, 2, 3] = np.nan
    np.testing.assert_array_equal(interpolate(space, field, positions)[0], np.repeat(field, 2, axis=0))


@pytest.mark.parametrize(
    ("lat", "lon", "words"),
    [
        ([40.0, 39.0], [100.0, 101.0, 102.0], "2 x 3 cells: expected at least 3 x 3"),
        ([90.0, 80.0, 70.0], [0.0, 10.0, 20.0], "latitude 90: expected cells within 89"),
    ],
)
def test_grids_without_paths_are_refused(lat, lon, words):
    with pytest.raises(ConfigError, match=f"data.advect.*{words}"):
        IndexSpace(np.array(lat), np.array(lon))
