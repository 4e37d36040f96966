"""Compare the ridge with loops that follow its definition and with numpy's least squares."""

import functools
from dataclasses import dataclass
from math import asin, atan2, cos, degrees, pi, radians, sin, sqrt

import numpy as np
import pytest

from topoflow.data.grid import Grid
from topoflow.physics import ridge as module
from topoflow.physics import ridge_features
from topoflow.physics.persistence import DampedPersistence, fit_damped_persistence
from topoflow.physics.ridge import Ridge, fit_ridge
from topoflow.physics.ridge_base import RidgeForecasts
from topoflow.physics.ridge_features import RidgeFeatures

TARGETS, LEADS = ("pm25", "o3"), (6, 24)
HOURS, FIRST_START = 1100, 760


@dataclass
class ArraySource:
    """Fields in memory, float32 [n, H, W] by name."""

    times: np.ndarray
    fields: dict[str, np.ndarray]
    grid: Grid
    step_hours: int = 1
    first_start: int = FIRST_START

    def read(self, name, indices):
        return self.fields[name][indices]


def make_source(shape=(3, 5), seed=0, hours=HOURS, step_hours=1):
    """Return fields with gaps, of which some are days long; cells are 1.3 degrees apart."""
    rng = np.random.default_rng(seed)
    lat2d, lon2d = np.meshgrid(45 - 1.3 * np.arange(shape[0]), 100 + 1.3 * np.arange(shape[1]), indexing="ij")
    times, fields = np.datetime64("2019-03-01T05", "h") + step_hours * np.arange(hours), {}
    common = np.zeros((hours, 1, 1))
    for name in TARGETS:
        values = np.zeros((hours, *shape))
        for i in range(1, hours):
            common[i] = 0.95 * common[i - 1] + rng.standard_normal()
            values[i] = 0.9 * values[i - 1] + rng.standard_normal(shape)
        values = (50 + 10 * np.sin(2 * np.pi * np.arange(hours) / 24)[:, None, None] + values + common).astype(
            np.float32
        )
        values[rng.random(values.shape) < 0.15] = np.nan
        for _ in range(10):
            begin, row, column = rng.integers(hours), rng.integers(shape[0]), rng.integers(shape[1])
            values[begin : begin + 40, row, column] = np.nan
        fields[name] = values
    return ArraySource(times, fields, Grid(lat2d, lon2d), step_hours)


def split(source):
    """Return training starts and validation starts."""
    starts = np.arange(source.first_start // source.step_hours, len(source.times) - max(LEADS) // source.step_hours)
    return starts[: len(starts) * 2 // 3], starts[len(starts) * 2 // 3 :]


def fit_persistence(source, mask):
    training, _ = split(source)
    times = np.arange(training[-1] + max(LEADS) // source.step_hours + 1)
    return fit_damped_persistence(source, TARGETS, LEADS, times, training, mask, seasonal=False)[0]


def fit(source, mask=None, validate=True, **options) -> tuple[Ridge, RidgeFeatures, DampedPersistence]:
    mask = np.ones(source.grid.shape, bool) if mask is None else mask
    persistence, (training, validation) = fit_persistence(source, mask), split(source)
    starts = (training, validation) if validate else (np.concatenate([training, validation]), None)
    ridge = fit_ridge(source, TARGETS, LEADS, *starts, mask, persistence, **options)
    return ridge, RidgeFeatures(source, TARGETS, persistence, ridge.known), persistence


def forecasts(ridge, features, starts, in_training=False):
    """Return the forecasts [n, leads, T, H, W] in the units of the data."""
    made = RidgeForecasts(features.source, TARGETS, features.persistence, ridge, starts, in_training)
    return np.array([[made.forecast(start, k) for k in range(len(LEADS))] for start in starts])


class Definition:
    """The features and forecasts of the ridge by definition, one sample at a time."""

    def __init__(self, source, persistence, known):
        self.source, self.persistence, self.known = source, persistence, known > 0
        self.cells = [list(zip(*np.nonzero(seen), strict=True)) for seen in self.known]
        for name in ("mean", "now", "features"):
            setattr(self, name, functools.cache(getattr(self, name)))
        self.anomaly = {}  # by target, cell and time; only where there is one
        for i, time in enumerate(source.times):
            usual = persistence.climatology.at(time)
            for t, name in enumerate(TARGETS):
                for cell in self.cells[t]:
                    value = source.fields[name][i][cell]
                    if np.isfinite(value):
                        self.anomaly[t, cell, time] = (float(value) - usual[t][cell]) / persistence.deviation[t]

    def mean(self, t, cell, time, hours):
        step = self.source.step_hours
        past = [time - np.timedelta64(back * step, "h") for back in range(max(hours // step, 1))]
        values = [self.anomaly[t, cell, hour] for hour in past if (t, cell, hour) in self.anomaly]
        return sum(values) / len(values) if values else 0.0

    def now(self, t, cell, time):
        return self.anomaly.get((t, cell, time), self.mean(t, cell, time, 12))

    def way(self, a, b):
        """Return distance in km (haversine) and initial bearing in degrees from cell a to cell b."""
        la, lb = radians(self.source.grid.lat2d[a]), radians(self.source.grid.lat2d[b])
        turn = radians(self.source.grid.lon2d[b] - self.source.grid.lon2d[a])
        h = sin((lb - la) / 2) ** 2 + cos(la) * cos(lb) * sin(turn / 2) ** 2
        bearing = atan2(sin(turn) * cos(lb), cos(la) * sin(lb) - sin(la) * cos(lb) * cos(turn))
        return 2 * 6371.0088 * asin(sqrt(h)), degrees(bearing)

    def features(self, t, cell, time):
        others = [c for c in self.cells[t] if c != cell]
        ways = {c: self.way(cell, c) for c in others}
        nearest = sorted(others, key=lambda c: (round(ways[c][0], 3), c))

        def over(cells, value):
            return sum(value(t, c, time) for c in cells) / len(cells) if cells else 0.0

        now, day = self.now(t, cell, time), self.mean(t, cell, time, 24)
        found = [now, day, self.mean(t, cell, time, 240)]
        found.append(over(nearest[8:39], lambda *where: self.mean(*where, 24)))
        for middle in (0, 90, 180, 270):
            for inner, outer in ((0, 300), (300, 800)):
                aside = {c: (ways[c][1] - middle + 180) % 360 - 180 for c in nearest}
                sector = [c for c in nearest if -45 <= aside[c] < 45 and inner < ways[c][0] <= outer]
                assert len(sector) <= 16
                found.append(over(sector, self.now))
        angle = 2 * pi * int(str(time)[11:13]) / 24
        found.append(self.mean(t, cell, time, 720))
        found += [now * sin(angle), now * cos(angle), day * sin(angle), day * cos(angle), max(now, 0)]
        for other in range(len(TARGETS)):
            if other != t:
                found += [self.now(other, cell, time), self.mean(other, cell, time, 24)]
                found.append(over(nearest[8:39], lambda _, *where, other=other: self.now(other, *where)))
                found.append(over(nearest[8:39], lambda _, *where, other=other: self.mean(other, *where, 24)))
        for q in range(len(TARGETS)):
            found.append(sum(self.now(q, c, time) for c in self.cells[q]) / len(self.cells[q]))
        return found

    def samples(self, t, lead, starts):
        """Return features [n, F], anomalies at the lead [n] and the cell of each sample."""
        x, y, cells = [], [], []
        for start in starts:
            time = self.source.times[start]
            for cell in self.cells[t]:
                at_lead = (t, cell, time + np.timedelta64(lead, "h"))
                if at_lead in self.anomaly:
                    x.append(self.features(t, cell, time))
                    y.append(self.anomaly[at_lead])
                    cells.append(cell)
        return np.array(x), np.array(y), cells


def shrunk_least_squares(x, y, strength):
    """Return the least squares solution with one more row sqrt(strength) for each coefficient, towards 0."""
    rows = np.concatenate([x, sqrt(strength) * np.eye(x.shape[1])])
    return np.linalg.lstsq(rows, np.concatenate([y, np.zeros(x.shape[1])]), rcond=None)[0]


def check_with_definition(source, monkeypatch, mask=None):
    monkeypatch.setattr(module, "POOLED_STRENGTHS", (40.0,))
    monkeypatch.setattr(module, "CELL_STRENGTHS", (5.0,))
    monkeypatch.setattr(module, "EVERY", 29)
    ridge, features, persistence = fit(source, mask)
    definition, (training, validation) = Definition(source, persistence, ridge.known), split(source)
    starts = validation[::30]
    forecast = forecasts(ridge, features, starts)
    for t in range(len(TARGETS)):
        for k, lead in enumerate(LEADS):
            x, y, cells = definition.samples(t, lead, training[::29])
            pooled, own = shrunk_least_squares(x, y, 40.0), {}
            for cell in definition.cells[t]:
                rows = [row for row, other in enumerate(cells) if other == cell]
                own[cell] = np.zeros(12)
                if rows:
                    own[cell] = shrunk_least_squares(x[rows, :12], y[rows] - x[rows] @ pooled, 5.0)
            np.testing.assert_allclose(ridge.pooled[0, t, k], pooled, atol=1e-4)
            for i, start in enumerate(starts):
                time = source.times[start]
                for cell in definition.cells[t]:
                    known = np.array(definition.features(t, cell, time))
                    anomaly = known @ pooled + known[:12] @ own[cell]
                    usual = persistence.climatology.at(time + np.timedelta64(lead, "h"))[t][cell]
                    expected = usual + persistence.deviation[t] * anomaly
                    assert forecast[i, k, t][cell] == pytest.approx(expected, abs=1e-3)
    return ridge


def test_forecasts_equal_the_definition(monkeypatch):
    ridge = check_with_definition(make_source(), monkeypatch)
    assert np.abs(ridge.own[0, :, :, 3:12]).max() > 0.01  # neighbours count


def test_one_cell_has_no_neighbours(monkeypatch):
    ridge = check_with_definition(make_source((1, 1)), monkeypatch)
    assert np.all(ridge.pooled[0, :, :, 3:12] == 0)


def test_steps_of_three_hours(monkeypatch):
    check_with_definition(make_source((2, 3), hours=500, step_hours=3), monkeypatch)


def test_hours_that_the_data_lack_are_missing(monkeypatch):
    source = make_source((2, 3))
    kept = np.delete(np.arange(HOURS), np.r_[300:310, 700:703])
    fields = {name: values[kept] for name, values in source.fields.items()}
    check_with_definition(ArraySource(source.times[kept], fields, source.grid), monkeypatch)


def test_the_past_may_begin_before_the_data(monkeypatch):
    source = make_source((2, 3))
    fields = {name: values[500:] for name, values in source.fields.items()}
    check_with_definition(ArraySource(source.times[500:], fields, source.grid, first_start=0), monkeypatch)


def test_cells_without_values_in_training(monkeypatch):
    source = make_source()
    mask = np.ones((3, 5), bool)
    mask[2, 4] = False
    source.fields["pm25"][:1050, 1, 2] = np.nan  # observed, but only later
    for name in TARGETS:
        source.fields[name][:1050, 0, 1] = np.nan
    ridge = check_with_definition(source, monkeypatch, mask)
    assert ridge.known[:, 0, 1].tolist() == [0, 0]
    assert ridge.known[:, 1, 2].tolist() == [0, 1]
    assert not ridge.known[:, 2, 4].any()
    _, features, persistence = fit(source, mask)
    forecast = forecasts(ridge, features, np.array([1070]))
    for k, lead in enumerate(LEADS):
        usual = persistence.climatology.at(source.times[1070] + np.timedelta64(lead, "h"))
        np.testing.assert_array_equal(forecast[0, k, :, 0, 1], usual[:, 0, 1])
        assert np.isfinite(usual[:, 0, 1]).all()


def test_the_strengths_have_the_least_error_on_validation(monkeypatch):
    source = make_source((2, 3))
    monkeypatch.setattr(module, "EVERY", 1)
    lists = module.POOLED_STRENGTHS, module.CELL_STRENGTHS
    chosen = fit(source)[0].strengths
    validation = split(source)[1]

    def errors(pooled_strength, cell_strength):
        monkeypatch.setattr(module, "POOLED_STRENGTHS", (pooled_strength,))
        monkeypatch.setattr(module, "CELL_STRENGTHS", (cell_strength,))
        ridge, features, _ = fit(source)
        forecast, found = forecasts(ridge, features, validation), np.zeros((2, 2))
        for t, name in enumerate(TARGETS):
            for k, lead in enumerate(LEADS):
                found[t, k] = np.nansum(np.square(forecast[:, k, t] - source.fields[name][validation + lead]))
        return found

    pooled = np.array([errors(strength, np.inf) for strength in lists[0]])
    assert np.array_equal(chosen[..., 0], np.array(lists[0])[pooled.argmin(axis=0)])
    for (t, k), best in np.ndenumerate(chosen[..., 0]):
        own = [errors(best, strength)[t, k] for strength in lists[1]]
        assert chosen[t, k, 1] == lists[1][int(np.argmin(own))]
    assert len(np.unique(chosen)) > 3


def test_a_training_start_is_forecast_by_a_fit_to_the_other_folds(monkeypatch):
    monkeypatch.setattr(module, "EVERY", 1)
    monkeypatch.setattr(module, "LONGEST_BLOCK_HOURS", 20)
    source, starts = make_source((2, 3)), np.arange(750, 1050)
    persistence, mask = fit_persistence(source, np.ones((2, 3), bool)), np.ones((2, 3), bool)
    ridge = fit_ridge(source, TARGETS, LEADS, starts, None, mask, persistence)
    features = RidgeFeatures(source, TARGETS, persistence, ridge.known)
    forecast = forecasts(ridge, features, starts, in_training=True)
    for (t, k), strength in np.ndenumerate(ridge.strengths[..., 0]):
        monkeypatch.setattr(module, "POOLED_STRENGTHS", (strength,))
        monkeypatch.setattr(module, "CELL_STRENGTHS", (ridge.strengths[t, k, 1],))
        everything = fit_ridge(source, TARGETS, LEADS, starts, None, mask, persistence)
        np.testing.assert_allclose(ridge.pooled[0, t, k], everything.pooled[0, t, k], rtol=1e-8, atol=1e-12)
        for fold in range(5):
            left_out = (starts - 750) // 20 % 5 == fold
            others = fit_ridge(source, TARGETS, LEADS, starts[~left_out], None, mask, persistence)
            np.testing.assert_allclose(ridge.own[1 + fold, t, k], others.own[0, t, k], rtol=1e-5, atol=1e-9)
            expected = forecasts(others, features, starts[left_out])
            np.testing.assert_allclose(forecast[left_out][:, k, t], expected[:, k, t], rtol=1e-5)


def test_without_validation_the_folds_choose(monkeypatch):
    source, starts, mask = make_source((2, 3)), np.arange(750, 1050), np.ones((2, 3), bool)
    monkeypatch.setattr(module, "EVERY", 1)
    lists = module.POOLED_STRENGTHS, module.CELL_STRENGTHS
    persistence = fit_persistence(source, mask)

    def fit_folds():
        ridge = fit_ridge(source, TARGETS, LEADS, starts, None, mask, persistence)
        features = RidgeFeatures(source, TARGETS, persistence, ridge.known)
        forecast, found = forecasts(ridge, features, starts, in_training=True), np.zeros((2, 2))
        for t, name in enumerate(TARGETS):
            for k, lead in enumerate(LEADS):
                found[t, k] = np.nansum(np.square(forecast[:, k, t] - source.fields[name][starts + lead]))
        return ridge.strengths, found

    chosen = fit_folds()[0]
    monkeypatch.setattr(module, "CELL_STRENGTHS", (np.inf,))
    pooled = []
    for strength in lists[0]:
        monkeypatch.setattr(module, "POOLED_STRENGTHS", (strength,))
        pooled.append(fit_folds()[1])
    assert np.array_equal(chosen[..., 0], np.array(lists[0])[np.argmin(pooled, axis=0)])
    assert len(np.unique(chosen[..., 0])) > 1


def test_what_is_read_at_once_does_not_matter(monkeypatch):
    source = make_source()
    ridge, features, _ = fit(source)
    starts = split(source)[1]
    forecast = forecasts(ridge, features, starts)
    for size in (1, 7):
        blocks = [starts[first : first + size] for first in range(0, len(starts), size)]
        found = np.concatenate([forecasts(ridge, features, block) for block in blocks])
        assert found.tobytes() == forecast.tobytes()
    monkeypatch.setattr(ridge_features, "_PART_VALUES", 500)
    assert forecasts(ridge, features, starts).tobytes() == forecast.tobytes()
    monkeypatch.setattr(ridge_features, "BLOCK_VALUES", 1)
    monkeypatch.setattr(ridge_features, "_SHORTEST_BLOCK", 50)
    monkeypatch.setattr(module, "SUMS_BYTES", 1)
    for name, values in fit(source)[0].arrays().items():
        np.testing.assert_allclose(values, getattr(ridge, name), rtol=1e-6, atol=1e-9)


def test_processes_that_fit_different_targets_add_up():
    source = make_source((2, 3))
    together = fit(source)[0].arrays()
    parts = [fit(source, only=[name])[0].arrays() for name in TARGETS]
    for name, values in together.items():
        if name == "blocks":
            assert all(np.array_equal(part[name], values) for part in parts)
            continue
        assert sum(part[name] for part in parts).tobytes() == values.tobytes()
        axis = 1 if name in ("pooled", "own") else 0
        assert not np.take(parts[0][name], 1, axis).any()
        assert not np.take(parts[1][name], 0, axis).any()


def test_a_forecast_uses_nothing_after_its_start():
    source, start = make_source((2, 3)), 1000
    ridge, features, _ = fit(source)
    starts = np.array([start - 30, start, start + 40])
    forecast = forecasts(ridge, features, starts)
    for name in TARGETS:
        source.fields[name][start + 1 :] = 1e6
        source.fields[name][start + 3 :: 2] = np.nan
    changed = forecasts(ridge, features, starts)
    assert changed[:2].tobytes() == forecast[:2].tobytes()
    assert np.all(changed[2] != forecast[2])
    source.fields["o3"][start] += 1
    changed = forecasts(ridge, features, starts)
    assert changed[0].tobytes() == forecast[0].tobytes()
    assert np.all(changed[1] != forecast[1])


def test_neighbours_on_a_dense_grid():
    """The 9th to 39th nearest cells; of a sector with more than 16 cells, 16 from the nearest to the farthest."""
    lat2d, lon2d = np.meshgrid(44 - 0.3 * np.arange(13), 10 + 0.3 * np.arange(13), indexing="ij")
    values = np.random.default_rng(0).integers(-(2**10), 2**10, (1, 13, 13)) / 2**6
    fields = {name: values.astype(np.float32) for name in TARGETS}
    source = ArraySource(np.array(["2019-03-01T00"], "datetime64[h]"), fields, Grid(lat2d, lon2d))
    sizes = {"hourly": 24, "annual": 0, "filled": 24, "slope": 2}
    arrays = {name: np.zeros((2, size, 13, 13)) for name, size in sizes.items()}
    arrays |= {"squares": np.ones((2, 2)), "lead_times_hours": np.array(LEADS)}
    persistence = DampedPersistence.from_arrays(
        {**arrays, "squares": np.ones((2, 2)), "lead_times_hours": np.array(LEADS)}
    )
    features, start = RidgeFeatures(source, TARGETS, persistence, np.ones((2, 13, 13))), np.array([0])
    past = features.summarize(features.read_anomalies(start), start)
    found = np.stack([feature[:, 0] for feature in features.of_target(0, past, slice(169))])

    definition, cells = Definition(source, persistence, np.ones((2, 13, 13))), list(np.ndindex(13, 13))
    for cell in ((6, 6), (0, 12), (4, 9)):
        ways = {other: definition.way(cell, other) for other in cells if other != cell}
        nearest = sorted(ways, key=lambda other: (round(ways[other][0], 3), other))
        chosen = {3: nearest[8:39]}
        for sector, middle in enumerate((0, 90, 180, 270)):
            inside = [c for c in nearest if ways[c][0] <= 300 and -45 <= (ways[c][1] - middle + 180) % 360 - 180 < 45]
            if len(inside) > 16:
                inside = [inside[i * (len(inside) - 1) // 15] for i in range(16)]
            chosen[4 + 2 * sector] = inside
        for feature, others in chosen.items():
            expected = np.mean([values[0][other] for other in others]) if others else 0.0
            assert found[feature, cells.index(cell)] == pytest.approx(expected, abs=1e-12)


def test_the_arrays_are_all_that_a_forecast_needs():
    source = make_source((2, 3))
    ridge, features, persistence = fit(source)
    arrays = {name: values.copy() for name, values in ridge.arrays().items()}
    copy = Ridge(**arrays)
    again = RidgeFeatures(source, TARGETS, persistence, copy.known)
    starts = np.array([1000, 1040])
    assert forecasts(copy, again, starts).tobytes() == forecasts(ridge, features, starts).tobytes()


def test_air_that_moves_is_seen_upwind():
    """A pattern moves east by one cell in 6 h: damped persistence cannot know, the cells to the west do."""
    rng, hours, columns = np.random.default_rng(1), 1500, 12
    upwind = rng.standard_normal(hours // 6 + columns + 1)
    position = columns - np.arange(columns)[None] + np.arange(hours)[:, None] / 6
    pattern = np.interp(position, np.arange(len(upwind)), upwind)
    fields = {name: (50 + 10 * np.stack([pattern, pattern], axis=1)).astype(np.float32) for name in TARGETS}
    grid = Grid(*np.meshgrid([40.0, 39.0], 100.0 + np.arange(columns), indexing="ij"))
    source = ArraySource(np.datetime64("2019-03-01T00", "h") + np.arange(hours), fields, grid)
    ridge, features, persistence = fit(source)
    starts = split(source)[1]
    error, damped = forecasts(ridge, features, starts)[:, 0, 0] - fields["pm25"][starts + 6], []
    for start in starts:
        anomaly = fields["pm25"][start] - persistence.climatology.at(source.times[start])
        target = source.times[start] + np.timedelta64(6, "h")
        damped.append(persistence.forecast(anomaly, target, 0)[0] - fields["pm25"][start + 6])
    inside = (slice(None), slice(None), slice(3, None))
    assert np.sqrt(np.mean(error[inside] ** 2)) < 0.75 * np.sqrt(np.mean(np.array(damped)[inside] ** 2))
