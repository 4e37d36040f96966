"""The spread of forecasts, compared with closed forms and with ensembles of past errors."""

import numpy as np
import pytest

from topoflow.spread import ErrorCounts, Spread

MEAN, STD, LEADS = np.array([50.0, 800.0]), np.array([20.0, 300.0]), 2


def draw(rng, samples, error_of_forecast):
    """Forecasts and observations [samples, T, H, W], whose errors have a spread that depends on the forecast."""
    forecast = MEAN[:, None, None] + STD[:, None, None] * rng.standard_normal((samples, 2, 5, 8))
    sigma = error_of_forecast((forecast - MEAN[:, None, None]) / STD[:, None, None]) * STD[:, None, None]
    return forecast, forecast + sigma * rng.standard_normal(forecast.shape), sigma


def measure(forecast, observed, valid=None, leads=None):
    counts = ErrorCounts(MEAN, STD, LEADS)
    valid = np.ones(forecast.shape, bool) if valid is None else valid
    counts.add(np.arange(len(forecast)) % LEADS if leads is None else leads, forecast, observed, valid)
    return counts


def test_errors_of_a_normal_distribution_have_its_crps_and_coverage():
    rng = np.random.default_rng(0)
    forecast, observed, sigma = draw(rng, 1000, lambda value: np.full_like(value, 0.5))
    spread = Spread.measured(measure(forecast, observed))
    forecast, observed, sigma = draw(rng, 1000, lambda value: np.full_like(value, 0.5))
    inside, crps = spread.judge(np.arange(1000) % LEADS, forecast, observed)
    assert inside.mean() == pytest.approx(0.8, abs=0.01)
    # E|X - y| - E|X - X'| / 2 of three independent normal variables (Gneiting & Raftery 2007, section 4.2)
    np.testing.assert_allclose((crps / sigma).mean(axis=(0, 2, 3)), 1 / np.sqrt(np.pi), rtol=0.02)


def test_large_forecasts_have_wide_intervals_if_their_errors_are_large():
    rng = np.random.default_rng(1)

    def grows(value):
        return 0.1 + 0.2 * (value > 0)

    spread = Spread.measured(measure(*draw(rng, 3000, grows)[:2]))
    forecast, observed, _ = draw(rng, 1000, grows)
    inside, _ = spread.judge(np.arange(1000) % LEADS, forecast, observed)
    value = (forecast - MEAN[:, None, None]) / STD[:, None, None]
    for part in (value < -0.9, value > 0.9):  # the lowest and the highest fifth
        assert inside[part].mean() == pytest.approx(0.8, abs=0.015)


def test_the_crps_is_that_of_the_ensemble_of_past_errors():
    rng = np.random.default_rng(2)
    forecast = np.full((40, 2, 5, 8), MEAN[:, None, None])  # one group
    observed = forecast + STD[:, None, None] * rng.gamma(1.0, 0.7, forecast.shape)
    leads = np.zeros(40, np.int64)
    counts = measure(forecast, observed, leads=leads)
    counts.counts[:, 1] = counts.counts[:, 0]
    new = forecast[:1] + STD[:, None, None] * rng.uniform(-1, 3, (1, 2, 5, 8))
    inside, crps = Spread.measured(counts).judge(np.array([0]), forecast[:1], new)
    for t in range(2):
        errors = (observed - forecast)[:, t].ravel()
        half = np.abs(errors[:, None] - errors).mean() / 2
        for error, found, within in zip((new - forecast)[0, t].flat, crps[0, t].flat, inside[0, t].flat, strict=True):
            assert found == pytest.approx(np.abs(errors - error).mean() - half, abs=0.01 * STD[t])
            low, high = np.quantile(errors, [0.1, 0.9])
            assert within == (low < error < high) or min(abs(error - low), abs(error - high)) < 0.02 * STD[t]


def test_values_that_do_not_count_and_large_errors():
    rng = np.random.default_rng(3)
    forecast, observed, _ = draw(rng, 20, np.ones_like)
    valid = rng.random(forecast.shape) < 0.5
    observed[~valid] = np.nan
    observed[0, 0, 0, 0], valid[0, 0, 0, 0] = 1e9, True
    counts = measure(forecast, observed, valid)
    assert counts.counts.sum() == valid.sum()
    assert counts.counts[0, 0, :, -1].sum() >= 1
    parts = [measure(forecast[part], observed[part], valid[part]) for part in (slice(0, 8), slice(8, 20))]
    assert np.array_equal(parts[0].counts + parts[1].counts, counts.counts)


def test_a_target_without_errors_has_no_spread():
    forecast, observed, _ = draw(np.random.default_rng(4), 4, np.ones_like)
    valid = np.ones(forecast.shape, bool)
    valid[:, 1] = False
    assert Spread.measured(measure(forecast, observed, valid)) is None
