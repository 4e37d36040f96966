"""The seasonal climatology equals a least squares with all its terms written out, cell by cell."""

import numpy as np
import pytest

from tests.support.fields import ArraySource
from topoflow.physics import climatology as module
from topoflow.physics.climatology import covers_the_year, fit_climatologies

YEAR = np.datetime64("2018-01-01T00", "h") + np.arange(2 * 365 * 24)


def make_year(seed=0, step=5):
    """Return two years of every fifth hour, with a cycle of the day that changes over the year, noise and gaps."""
    rng, times = np.random.default_rng(seed), YEAR[::step]
    hour = times.astype(np.int64) % 24
    angle = 2 * np.pi * day_of_year(times) / 365.25
    cycle = 50 + 10 * np.cos(angle) + (8 + 5 * np.sin(angle)) * np.sin(2 * np.pi * hour / 24)
    values = cycle[:, None, None] * rng.uniform(0.5, 2, (1, 2, 3)) + 5 * rng.standard_normal((len(times), 2, 3))
    values[rng.random(values.shape) < 0.3] = np.nan
    return ArraySource(times, {"o3": values.astype(np.float32)}, step)


def day_of_year(times):
    return np.array([(t - t.astype("datetime64[Y]").astype("datetime64[h]")).astype(int) / 24 for t in times])


def design(times):
    """Return the terms at some times, in the order of the docstring of the module."""
    day, year = 2 * np.pi * (times.astype(np.int64) % 24) / 24, 2 * np.pi * day_of_year(times) / 365.25
    columns = [(times.astype(np.int64) % 24 == hour).astype(float) for hour in range(24)]
    of_day = [np.ones_like(day), np.cos(day), np.sin(day), np.cos(2 * day), np.sin(2 * day)]
    of_year = [np.cos(year), np.sin(year), np.cos(2 * year), np.sin(2 * year)]
    return np.stack(columns + [a * b for a in of_year for b in of_day], axis=1)


@pytest.mark.parametrize("block", [100, 480])
def test_seasonal_climatology_is_the_shrunk_least_squares(block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_HOURS", block)
    source, mask = make_year(), np.array([[True, True, False], [True, True, True]])
    training = np.flatnonzero(source.times < np.datetime64("2019-07-01", "h"))
    _, fitted = fit_climatologies(source, "o3", training, mask, seasonal=True)
    terms, shown = design(source.times[training]), source.times[[3, 1000, 3000, -1]]
    penalty = np.sqrt(module.SHRINKAGE_HOURS) * np.eye(44)[24:]
    for cell in np.argwhere(mask):
        values = source.fields["o3"][training][:, *cell].astype(np.float64)
        seen = np.isfinite(values)
        rows, right = np.concatenate([terms[seen], penalty]), np.concatenate([values[seen], np.zeros(20)])
        expected = design(shown) @ np.linalg.lstsq(rows, right, rcond=None)[0]
        assert [fitted.at(time)[0][*cell] for time in shown] == pytest.approx(expected, rel=1e-9)
        place = np.ravel_multi_index(cell, mask.shape)
        assert fitted.at_places(shown, np.array([0, place]))[:, 1] == pytest.approx(expected, rel=1e-9)
    assert np.all(fitted.at(shown[0])[0][~mask] == 0)


def test_hourly_climatology_does_not_depend_on_the_seasonal_one():
    source, mask = make_year(), np.ones((2, 3), bool)
    times = np.arange(len(source.times))
    alone, both = (fit_climatologies(source, "o3", times, mask, seasonal)[0] for seasonal in (False, True))
    assert np.allclose(alone.hourly, both.hourly, rtol=1e-13)
    assert not alone.is_seasonal
    assert not both.is_seasonal


def test_a_cell_without_values_has_the_mean_of_the_others():
    source = make_year()
    source.fields["o3"][:, 0, 0] = np.nan
    _, fitted = fit_climatologies(source, "o3", np.arange(len(source.times)), np.ones((2, 3), bool), seasonal=True)
    field = fitted.at(YEAR[1234])[0]
    assert field[0, 0] == pytest.approx(field.ravel()[1:].mean())
    assert fitted.filled_at(YEAR[1234])[0].ravel().tolist() == [True] + [False] * 5


def test_seasonal_climatology_follows_the_year_and_the_hourly_one_cannot():
    source = make_year()
    hourly, seasonal = fit_climatologies(source, "o3", np.arange(len(source.times)), np.ones((2, 3), bool), True)
    usual = [np.stack([climatology.at(time)[0] for time in source.times]) for climatology in (hourly, seasonal)]
    errors = [np.sqrt(np.nanmean((source.fields["o3"] - forecast) ** 2)) for forecast in usual]
    assert errors[1] < 5.5 < 7 < errors[0]  # the noise has a deviation of 5


@pytest.mark.parametrize(
    ("kept", "covers"),
    [
        (lambda days: np.ones(len(days), bool), True),
        (lambda days: days % 30 < 20, True),
        (lambda days: days < 180, False),
        (lambda days: (days < 100) | (days > 155), True),
        (lambda days: (days > 65) & (days < 360), False),  # New Year lies in the gap
    ],
)
def test_covers_the_year(kept, covers):
    days = (YEAR - YEAR[0]).astype(int) // 24 % 365
    assert covers_the_year(YEAR[kept(days)]) is covers
