"""Means by area and bilinear interpolation equal those of scipy and of areas on the sphere that are computed here."""

import itertools

import numpy as np
import pytest
from scipy.interpolate import RegularGridInterpolator
from scipy.sparse import csr_array

from topoflow.tools.prepare.regridding import FieldRegridding, PointMeans


def edges_about(centres):
    """Halfway between centres, and as far beyond the outer ones."""
    middle = (centres[1:] + centres[:-1]) / 2
    return np.array([2 * centres[0] - middle[0], *middle, 2 * centres[-1] - middle[-1]])


def shared(first, second):
    """Length that two intervals share."""
    return max(0.0, min(first[1], second[1]) - max(first[0], second[0]))


def area_matrix(lat, lon, target_lat, target_lon):
    """Areas on the unit sphere that each cell of the target shares with each of the source: [H W, h w]."""
    pairs = [
        [list(itertools.pairwise(edges_about(degrees))) for degrees in coordinates]
        for coordinates in ((lat, lon), (target_lat, target_lon))
    ]
    (rows, columns), (target_rows, target_columns) = pairs

    def height(a, b):
        (north, south), (other_north, other_south) = np.sin(np.radians(np.clip([a, b], -90, 90)))
        return shared((south, north), (other_south, other_north))

    def width(a, b):
        return sum(shared(np.add(a, turn), b) for turn in (-720, -360, 0, 360, 720))

    down = np.array([[height(row, target) for row in rows] for target in target_rows])
    across = np.array([[width(column, target) for column in columns] for target in target_columns])
    return csr_array(np.kron(down, across))


def means_by(matrix, fields, shape):
    """Weighted means of the values that are not missing, NaN without one."""
    flat = fields.reshape(len(fields), -1).astype("f8")
    present = np.isfinite(flat)
    total, weight = (matrix @ values.T for values in (np.where(present, flat, 0), present.astype("f8")))
    with np.errstate(invalid="ignore"):
        return np.where(weight > 1e-12, total / weight, np.nan).T.reshape(-1, *shape)


GRIDS = {
    "finer source": (
        (50 - 0.25 * np.arange(80), 100 + 0.25 * np.arange(90)),
        (48 - np.arange(16), 103 + np.arange(15)),
    ),
    "coarser source": ((60 - 2.5 * np.arange(12), 90 + 2.5 * np.arange(14)), (50 - np.arange(15), 95 + np.arange(20))),
    "edges that do not meet": (
        (50 - 0.3 * np.arange(70), 100 + 0.3 * np.arange(80)),
        (47.1 - 0.47 * np.arange(30), 103.3 + 0.47 * np.arange(35)),
    ),
    "unequal rows and columns": (
        (55 - 0.3 * np.arange(60) - 0.004 * np.arange(60) ** 2, 100 + 0.2 * np.arange(70) + 0.003 * np.arange(70) ** 2),
        (50.2 - 0.9 * np.arange(20), 101.1 + 0.9 * np.arange(22)),
    ),
    "globe across Greenwich": (
        (88.75 - 2.5 * np.arange(72), 1.25 + 2.5 * np.arange(144)),
        (70 - 1.7 * np.arange(40), -20.4 + 1.7 * np.arange(30)),
    ),
    "target beyond the source": (
        (45 - 0.5 * np.arange(20), 100 + 0.5 * np.arange(20)),
        (48 - 0.8 * np.arange(25), 95 + 0.8 * np.arange(25)),
    ),
}


def case(name, seed=0, dtype="f4"):
    (lat, lon), (target_lat, target_lon) = GRIDS[name]
    draw = np.random.default_rng(seed)
    fields = draw.gamma(4, 10, (5, len(lat), len(lon))).astype(dtype)
    fields[draw.random(fields.shape) < 0.2] = np.nan
    fields[1, : len(lat) // 2] = np.nan
    return fields, (lat, lon), (target_lat, target_lon)


def regridded(fields, source, target, method):
    source2d, target2d = (np.meshgrid(lat, lon, indexing="ij") for lat, lon in (source, target))
    return FieldRegridding(*source2d, *target2d, method).mean(fields)


@pytest.mark.parametrize("name", GRIDS)
def test_means_by_area_are_those_of_areas_on_the_sphere(name):
    fields, source, target = case(name)
    shape = len(target[0]), len(target[1])
    expected = means_by(area_matrix(*source, *target), fields, shape)
    found = regridded(fields, source, target, "area")
    assert np.isfinite(expected).any()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "with NaN"])
def test_bilinear_is_that_of_scipy(name, is_whole):
    fields, (lat, lon), target = case(name)
    if is_whole:
        fields = np.nan_to_num(fields, nan=7.0)
    found = regridded(fields, (lat, lon), target, "bilinear")
    goes_round = lon[-1] - lon[0] + (lon[1] - lon[0]) > 359.9
    around = (-360, 0, 360) if goes_round else (0,)
    wide = np.concatenate([lon + turn for turn in around])
    # as far as half a cell beyond the outermost centres, the value at the edge counts
    where = np.meshgrid(
        *(np.clip(x, y.min(), y.max()) for x, y in zip(target, (lat, wide), strict=True)), indexing="ij"
    )
    inside = [
        (x >= y.min() - (0.5 * np.median(abs(np.diff(y))))) & (x <= y.max() + 0.5 * np.median(abs(np.diff(y))))
        for x, y in zip(target, (lat, wide), strict=True)
    ]
    there = inside[0][:, None] & inside[1]

    def scipy_values(values):
        values = np.concatenate([values[::-1]] * len(around), axis=1).astype("f8")
        return RegularGridInterpolator((lat[::-1], wide), values)(tuple(where))

    for field, mine in zip(fields, found, strict=True):
        present = np.isfinite(field)
        total, weight = scipy_values(np.where(present, field, 0)), scipy_values(present)
        with np.errstate(invalid="ignore", divide="ignore"):
            expected = np.where(there & (weight > 1e-12), total / weight, np.nan)
        np.testing.assert_allclose(mine, expected, rtol=1e-6)


@pytest.mark.parametrize("method", ["area", "bilinear"])
def test_a_field_of_one_value_stays_it_and_missing_values_do_not_spread(method):
    fields, source, target = case("finer source")
    fields = np.where(np.isnan(fields), np.nan, 3.0)
    found = regridded(fields, source, target, method)
    np.testing.assert_allclose(found[np.isfinite(found)], 3.0, rtol=1e-6)
    assert np.isfinite(found[0]).mean() > 0.7


def test_cells_that_only_touch_give_each_other_nothing():
    """The coordinates of most files are float32: an edge that two grids share then differs by up to 2e-5 degrees."""
    lat, lon = np.arange(51.95, 44.9, -0.1), np.arange(356.05, 363.0, 0.1) % 360
    lat, lon = lat.astype("f4").astype("f8"), lon.astype("f4").astype("f8")
    lon = np.where(lon > 180, lon - 360, lon)
    draw = np.random.default_rng(0)
    fields = draw.gamma(4, 10, (3, len(lat), len(lon))).astype("f4")
    fields[:, 5:10, 5:15] = np.nan  # of the target: the first row, the first two columns
    target = np.arange(51.25, 44.9, -0.5), np.arange(-3.25, 4.6, 0.5)
    found = regridded(fields, (lat, lon), target, "area")
    assert np.isnan(found[:, 0, :2]).all()
    assert np.isnan(found[:, :, 13:]).all()  # beyond the last column of the source
    blocks = fields[:, 10:70, 5:65].astype("f8").reshape(3, 12, 5, 12, 5)
    rows = np.cos(np.radians(lat[10:70])).reshape(12, 5)
    expected = np.einsum("nrich,ri->nrc", blocks, rows / rows.sum(axis=1, keepdims=True)) / 5
    np.testing.assert_allclose(found[:, 1:, :12], expected, rtol=1e-4)


def test_people_are_shared_out_so_that_their_sum_stays():
    (lat, lon), target = GRIDS["edges that do not meet"]
    draw = np.random.default_rng(0)
    people = np.zeros((len(lat), len(lon)))
    people[20:40, 20:40] = draw.gamma(2, 1000, (20, 20))  # far inside the target
    source2d, target2d = np.meshgrid(lat, lon, indexing="ij"), np.meshgrid(*target, indexing="ij")
    found = FieldRegridding(*source2d, *target2d, "area").share_out(people)
    assert found.sum(dtype="f8") == pytest.approx(people.sum(), rel=1e-6)
    density = people / area_matrix(lat, lon, lat, lon).sum(axis=1).reshape(people.shape)
    expected = (area_matrix(lat, lon, *target) @ density.ravel()).reshape(found.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_points_of_a_projection_are_averaged_in_the_cells_that_enclose_them():
    draw = np.random.default_rng(0)
    lat, lon = draw.uniform(20, 30, 4000), draw.uniform(100, 112, 4000)
    values = draw.gamma(4, 10, (3, 4000))
    values[:, draw.random(4000) < 0.2] = np.nan
    target = np.meshgrid(np.arange(29.5, 20, -1), np.arange(100.5, 112), indexing="ij")
    found = PointMeans(lat, lon, *target).mean(values)
    for (row, north), (column, west) in itertools.product(enumerate(range(30, 20, -1)), enumerate(range(100, 112))):
        here = (lat >= north - 1) & (lat < north) & (lon >= west) & (lon < west + 1)
        np.testing.assert_allclose(found[:, row, column], np.nanmean(values[:, here], axis=1), rtol=1e-6)
