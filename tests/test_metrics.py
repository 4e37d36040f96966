"""Scores equal scipy's and the published formulas, for any split of the samples into batches."""

import numpy as np
import pytest
import scipy.stats

from topoflow.errors import TrainingDiverged
from topoflow.metrics import DAMPED, ScoreSums, within_factor_2

BASELINES = ("persistence", "climatology", *DAMPED)

LEADS, TARGETS, UNITS = (12, 24, 48), ("pm25", "co"), {"pm25": "ug m-3", "co": "mg m-3"}
STARTS, SHAPE = 5, (4, 6)


@pytest.fixture
def world():
    """Return 15 samples of 2 targets on 4 x 6 cells, with gaps in observations, present values and anomalies."""
    rng = np.random.default_rng(3)
    shape = (STARTS * len(LEADS), len(TARGETS), *SHAPE)
    observed = rng.lognormal(3.0, 0.8, shape)
    fields = {
        "observed": np.where(rng.random(shape) < 0.2, np.nan, observed),
        "forecast": observed * rng.lognormal(0.1, 0.5, shape) - 3.0,
        "filled": rng.random(shape) < 0.1,
    }
    fields["valid"] = np.isfinite(fields["observed"]) & (rng.random(shape) < 0.9)
    baselines = {name: rng.lognormal(3.0, 0.8, shape) for name in BASELINES}
    absent = rng.random(shape) < 0.3
    baselines["persistence"][absent] = np.nan
    for name in DAMPED:
        baselines[name][absent] = np.nan
    return fields | {"baselines": baselines}


def observed_mean(world):
    values = np.where(world["valid"], world["observed"], np.nan)
    return np.array([[np.nanmean(values[k :: len(LEADS), t]) for k in range(len(LEADS))] for t in range(len(TARGETS))])


def add_batches(sums, world, batches):
    for samples in batches:
        baselines = {name: values[samples] for name, values in world["baselines"].items()}
        arrays = [world[name][samples] for name in ("forecast", "observed", "valid")]
        sums.add(np.asarray(samples), *arrays, baselines, world["filled"][samples])
    return sums


def make_sums(world):
    return ScoreSums(STARTS, TARGETS, LEADS, UNITS, observed_mean(world), DAMPED)


def cut(size):
    """Return all samples in batches of `size`; the last one may be smaller."""
    samples = list(range(STARTS * len(LEADS)))
    return [samples[first : first + size] for first in range(0, len(samples), size)]


def pairs(world, t, k):
    """Return forecast, observation and baselines of one target and lead where the observation counts, flattened."""
    valid = world["valid"][k :: len(LEADS), t]
    flat = {name: values[k :: len(LEADS), t][valid] for name, values in world["baselines"].items()}
    return world["forecast"][k :: len(LEADS), t][valid], world["observed"][k :: len(LEADS), t][valid], flat


def test_scores_equal_the_published_formulas(world):
    records = add_batches(make_sums(world), world, cut(4)).finish()
    assert [(r["target"], r["lead_hours"], r["unit"]) for r in records] == [
        (target, lead, UNITS[target]) for target in TARGETS for lead in LEADS
    ]
    for i, record in enumerate(records):
        f, o, baselines = pairs(world, i // len(LEADS), i % len(LEADS))
        present = np.isfinite(baselines["persistence"])
        ratio = f / o  # o > 0 here
        expected = {
            "n": len(o),
            "rmse": np.sqrt(np.mean((f - o) ** 2)),
            "mae": np.mean(np.abs(f - o)),
            "bias": np.mean(f) - np.mean(o),
            "nmb": np.mean(f) / np.mean(o) - 1,
            "correlation": scipy.stats.pearsonr(f, o).statistic,
            "ioa": 1 - np.sum((f - o) ** 2) / np.sum((np.abs(f - o.mean()) + np.abs(o - o.mean())) ** 2),
            "fac2": np.mean((ratio >= 0.5) & (ratio <= 2)),
            "persistence_rmse": np.sqrt(np.nanmean((baselines["persistence"] - o) ** 2)),
            "climatology_rmse": np.sqrt(np.mean((baselines["climatology"] - o) ** 2)),
            **{f"{name}_rmse": np.sqrt(np.nanmean((baselines[name] - o) ** 2)) for name in DAMPED},
            "n_where_present": present.sum(),
            "rmse_where_present": np.sqrt(np.mean((f - o)[present] ** 2)),
            "climatology_rmse_where_present": np.sqrt(np.mean((baselines["climatology"] - o)[present] ** 2)),
        }
        assert 0 < present.sum() < len(o)
        for name, value in expected.items():
            assert record[name] == pytest.approx(value, rel=1e-12), (record["target"], record["lead_hours"], name)


def test_filled_climatology_is_counted_where_the_observation_counts(world):
    records = add_batches(make_sums(world), world, cut(4)).finish()
    for i, record in enumerate(records):
        chosen = np.s_[i % len(LEADS) :: len(LEADS), i // len(LEADS)]
        assert record["n_climatology_filled"] == (world["filled"][chosen] & world["valid"][chosen]).sum() > 0


@pytest.mark.parametrize("size", [1, 2, 7, 15])
def test_scores_do_not_depend_on_batch_size(world, size):
    assert (
        add_batches(make_sums(world), world, cut(size)).finish()
        == add_batches(make_sums(world), world, cut(4)).finish()
    )


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_scores_do_not_depend_on_ranks(world, world_size):
    whole = add_batches(make_sums(world), world, cut(2))
    ranks = [add_batches(make_sums(world), world, cut(2)[rank::world_size]) for rank in range(world_size)]
    merged = make_sums(world)
    merged.rows[:] = np.sum([sums.rows for sums in ranks], axis=0)
    assert np.array_equal(merged.rows, whole.rows)
    assert merged.finish() == whole.finish()


def test_missing_or_repeated_samples_are_detected(world):
    batches = cut(3)
    with pytest.raises(AssertionError, match="once"):
        add_batches(make_sums(world), world, batches[:-1]).finish()
    with pytest.raises(AssertionError, match="once"):
        add_batches(make_sums(world), world, [*batches, batches[0]]).finish()


def test_values_that_do_not_count_are_ignored(world):
    before = add_batches(make_sums(world), world, cut(5)).finish()
    for name in ("forecast", "observed"):
        world[name] = np.where(world["valid"], world[name], np.inf)
    world["baselines"]["climatology"] = np.where(world["valid"], world["baselines"]["climatology"], -np.inf)
    assert add_batches(make_sums(world), world, cut(5)).finish() == before


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_forecast_that_is_not_finite_is_an_error_that_names_target_and_lead(world, value):
    where = np.argwhere(world["valid"][7, 1])[0]  # sample 7: lead 24 h; target 1: co
    world["forecast"][7, 1, *where] = value
    sums = add_batches(make_sums(world), world, cut(5))
    with pytest.raises(TrainingDiverged, match=r"1 forecasts of co at 24 h are not finite"):
        sums.finish()


def test_infinities_of_both_signs_are_the_same_error(world):
    for value, sample in ((np.inf, 7), (-np.inf, 10)):  # both at 24 h
        world["forecast"][sample, 1, *np.argwhere(world["valid"][sample, 1])[0]] = value
    with pytest.raises(TrainingDiverged, match=r"2 forecasts of co at 24 h are not finite"):
        add_batches(make_sums(world), world, cut(5)).finish()


def test_no_observation_gives_none_and_never_nan(world):
    world["valid"][:, 1] = False
    world["observed"][:, 1] = np.nan
    mean = np.array([[np.mean(pairs(world, 0, k)[1]) for k in range(len(LEADS))], [0.0] * len(LEADS)])
    sums = ScoreSums(STARTS, TARGETS, LEADS, UNITS, mean, DAMPED, with_spread=True)
    records = add_batches(sums, world, cut(4)).finish()
    for record in records[len(LEADS) :]:
        assert record["n"] == record["n_where_present"] == record["n_climatology_filled"] == 0
        assert {key for key, value in record.items() if value is None} == set(record) - {
            "target", "lead_hours", "unit", "n", "n_where_present", "n_climatology_filled",
        }  # fmt: skip
    assert all(value is not None for record in records[: len(LEADS)] for value in record.values())


def test_a_baseline_that_was_not_fitted_is_none(world):
    whole = add_batches(make_sums(world), world, cut(4)).finish()
    for name in DAMPED[1:]:
        del world["baselines"][name]
    sums = ScoreSums(STARTS, TARGETS, LEADS, UNITS, observed_mean(world), DAMPED[:1])
    for record, before in zip(add_batches(sums, world, cut(4)).finish(), whole, strict=True):
        assert record == before | {f"{name}_rmse": None for name in DAMPED[1:]}


def test_missing_climatology_gives_none(world):
    for name in ("climatology", "damped_persistence"):
        world["baselines"][name][:] = np.nan
    for record in add_batches(make_sums(world), world, cut(4)).finish():
        assert record["climatology_rmse"] is record["damped_persistence_rmse"] is None
        assert record["climatology_rmse_where_present"] is None
        assert record["persistence_rmse"] > 0


def one_cell(forecast, observed):
    """Return the record of a single target and lead from a list of pairs."""
    f, o = (np.array(values, np.float64).reshape(-1, 1, 1, 1) for values in (forecast, observed))
    sums = ScoreSums(len(f), ("o3",), (12,), {"o3": "ug m-3"}, np.array([[o.mean()]]))
    sums.add(np.arange(len(f)), f, o, np.ones(f.shape, bool), dict.fromkeys(BASELINES, f), np.zeros(f.shape, bool))
    return sums.finish()[0]


def test_correlation_of_constant_values_is_none():
    observed = [11.0, 12.0, 14.5, 19.0]
    assert one_cell([0.1] * 4, observed)["correlation"] is None
    assert one_cell([1e4 / 3] * 4, observed)["correlation"] is None
    assert one_cell(observed, [0.1] * 4)["correlation"] is None
    assert one_cell([3.0], [4.0])["correlation"] is None
    assert one_cell([-value for value in observed], observed)["correlation"] == pytest.approx(-1.0, abs=1e-15)


def test_correlation_of_a_constant_forecast_is_none_over_many_cells():
    """The sums of many equal values are rounded, so that the variance from them is not exactly zero."""
    observed = np.random.default_rng(0).lognormal(3.0, 0.8, (3, 1, 37, 41))
    shift, everywhere = np.array([[observed.mean()]]), np.ones(observed.shape, bool)
    for constant in (0.1, 1 / 3, 33.3, 1e4 / 7):
        forecast = np.full(observed.shape, constant)
        sums = ScoreSums(3, ("o3",), (12,), {"o3": "ug m-3"}, shift)
        sums.add(np.arange(3), forecast, observed, everywhere, dict.fromkeys(BASELINES, forecast), ~everywhere)
        assert sums.finish()[0]["correlation"] is None


def test_perfect_forecast():
    record = one_cell([1.0, 2.0, 4.0], [1.0, 2.0, 4.0])
    assert (record["rmse"], record["bias"], record["ioa"], record["fac2"]) == (0.0, 0.0, 1.0, 1.0)
    assert one_cell([2.0, 2.0], [2.0, 2.0])["ioa"] is None  # 0 / 0


def test_a_mean_much_larger_than_the_deviations_costs_few_digits():
    rng = np.random.default_rng(0)
    observed = 1e5 + rng.standard_normal(2000)
    forecast = observed + 0.5 * rng.standard_normal(2000)
    record = one_cell(forecast, observed)
    # expected values from centred data, in which nothing cancels
    f, o = forecast - 1e5, observed - 1e5
    assert record["correlation"] == pytest.approx(np.corrcoef(f, o)[0, 1], rel=1e-9)
    potential = np.sum((np.abs(f - o.mean()) + np.abs(o - o.mean())) ** 2)
    assert record["ioa"] == pytest.approx(1 - np.sum((f - o) ** 2) / potential, rel=1e-9)


@pytest.mark.parametrize(
    ("forecast", "observed", "inside"),
    [
        (1.0, 2.0, True),
        (4.0, 2.0, True),
        (0.99, 2.0, False),
        (4.01, 2.0, False),
        (0.0, 0.0, True),
        (1e-9, 0.0, False),
        (-1.0, 2.0, False),
        (0.0, 2.0, False),
        (-2.0, -2.0, False),
    ],
)
def test_factor_of_2_with_zeros_and_negative_values(forecast, observed, inside):
    assert within_factor_2(np.array(forecast), np.array(observed)) == inside
    assert one_cell([forecast], [observed])["fac2"] == float(inside)


def test_normalized_mean_bias_is_a_fraction_and_none_over_zero():
    assert one_cell([12.0, 10.0], [8.0, 12.0])["nmb"] == pytest.approx(0.1, rel=1e-14)
    assert one_cell([1.0, 1.0], [-2.0, 2.0])["nmb"] is None
