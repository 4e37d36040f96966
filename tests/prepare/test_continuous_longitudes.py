"""Longitudes without jumps, and the cells of stations on both sides of the date line."""

from pathlib import Path

import numpy as np
import pytest

from topoflow.tools.prepare.cells import continuous_longitudes
from topoflow.tools.prepare.findings import Findings
from topoflow.tools.prepare.place import Place
from topoflow.tools.prepare.recipe import GridSpec, Recipe, Source
from topoflow.tools.prepare.regridding import PointMeans
from topoflow.tools.prepare.scan import Opener, Piece
from topoflow.tools.prepare.target import build_target


@pytest.mark.parametrize(
    ("lon", "expected"),
    [
        ([358, 359, 0, 1], [-2, -1, 0, 1]),
        ([179, -180, -179], [179, 180, 181]),
        ([-10, 350], [-10, -10]),
        ([110, 120], [110, 120]),
        ([250, 240], [-110, -120]),
        ([180], [-180]),
        ([0, 90, 200], [0, 90, 200]),
    ],
)
def test_longitudes_are_cut_at_their_widest_gap(lon, expected):
    np.testing.assert_allclose(continuous_longitudes(np.array(lon, float)), expected)


def test_any_turn_gives_the_same_longitudes():
    rng = np.random.default_rng(0)
    for _ in range(200):
        lon = rng.uniform(-180, 180) + rng.uniform(0, 170, rng.integers(1, 20))
        moved = lon + 360 * rng.integers(-1, 2, len(lon))
        cut = continuous_longitudes(moved)
        assert -180 <= cut.min() < 180
        np.testing.assert_allclose(cut - cut[0], lon - lon[0], atol=1e-9)


def test_longitudes_are_cut_where_asked():
    np.testing.assert_allclose(continuous_longitudes(np.array([0.0, 90, 180, 270]), west=90), [360, 90, 180, 270])


def cells_of(lat, lon):
    """The grid around stations, and the cell of each."""
    place = Place("stations", lat, lon, ("station",), (slice(None),))
    piece = Piece(0, Source(path=""), Path(), place, None, {}, {}, 1)
    findings = Findings()
    target = build_target(GridSpec(degrees=1.0), [piece], Opener(Recipe((piece.spec,)), findings), findings)
    assert target is not None, findings.sorted()
    return target, PointMeans(lat, lon, target.lat, target.lon, target.axes).cell


def test_stations_across_the_date_line_have_a_narrow_box():
    lat = np.array([-17.7, -18.1, -16.4, -18.2, -16.8, -19.1])
    lon = np.array([177.45, 178.4, 179.4, -178.8, -179.9, -178.2])
    target, cell = cells_of(lat, lon)
    assert target.shape == (4, 5)
    assert (cell >= 0).all()
    np.testing.assert_array_equal(target.lon[0], [177.5, 178.5, 179.5, 180.5, 181.5])


def test_stations_around_the_world_have_each_cell_once():
    lon = np.arange(-179.75, 180, 0.5)
    target, cell = cells_of(np.linspace(-60, 60, len(lon)), lon)
    assert target.shape[1] == 360
    assert (cell >= 0).all()
