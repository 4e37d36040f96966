"""Hierarchical ridge regression: the anomaly at the lead from past anomalies of the cell and of the cells around it.

Anomalies are in units of the target's deviation. One solution is pooled over all cells; each cell fits what that leaves
with a solution of its own, in the first CELL_FEATURES features. Both are shrunk towards 0, and the strengths are those
with the least error on the validation split. A forecast is climatology plus anomaly; it uses nothing after its start.

The features of a cell, in order:
  - its anomaly now, its means of the last 24 and 240 h, the 24 h mean of the 9th to 39th nearest cells, and the anomaly
    now of the cells north, east, south and west of it in two rings of distance: CELL_FEATURES so far;
  - its mean of the last 720 h, its anomaly now and 24 h mean times sine and cosine of the hour of day, and its anomaly
    now where that is positive;
  - of each other target the anomaly now and the 24 h mean, of the cell and of its 9th to 39th nearest cells; of each
    target the anomaly now of all cells.
A missing value now is replaced by the mean of the last 12 h; a mean of no values is 0.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from topoflow.data.grid import EARTH_RADIUS_KM, Grid
from topoflow.physics.climatology import HOURS, Fields, contiguous_blocks, hour_of_day
from topoflow.physics.persistence import DampedPersistence

PAST_HOURS = 720
"""Length of the past that a forecast uses; its last hour is the start."""
NEAREST, FARTHEST = 8, 39
"""The next cells are those after the 8 nearest, up to the 39th."""
RINGS_KM, CELLS_OF_SECTOR = (0, 300, 800), 16
"""A sector takes at most 16 of its cells in a ring, spread over their distances."""
CELL_FEATURES = 12
EVERY = 7
"""Only each 7th start is fitted to, which scores the same on China 2019 and Beijing as fitting to all of them.

7 and 24 have no common factor, so all hours of the day occur.
"""
POOLED_STRENGTHS = (1e6, 1e5, 1e4, 1e3, 1e2, 1e1)
CELL_STRENGTHS = (np.inf, 3e4, 1e4, 3e3, 1e3, 3e2, 1e2, 3e1)
"""To choose from; they are added to the diagonal of the normal equations. Infinite: cells have no own solution."""
BLOCK_VALUES, SUMS_BYTES = 10_000_000, 2_000_000_000
"""Limits on the values that are read at once and on the normal equations that are held at once."""
_SHORTEST_BLOCK, _READ_STEPS, _PART_VALUES = 480, 48, 2**17
_EXACT = 2.0**16
"""Anomalies are rounded to multiples of 1 / _EXACT, so that their sums are exact in any order."""


class GriddedFields(Fields, Protocol):
    """The part of a data set that the ridge uses."""

    grid: Grid


@dataclass(frozen=True)
class Ridge:
    """The coefficients of the features, between anomalies over deviation, float64.

    Attributes:
        pooled: [T, leads, features].
        own: [T, leads, CELL_FEATURES, H, W], what a cell adds to the pooled coefficients.
        strengths: [T, leads, 2], chosen for the pooled solution and for those of the cells.
        known: [T, H, W] 1 where the target was observed in training, else 0: there the climatology is the forecast.
    """

    pooled: np.ndarray
    own: np.ndarray
    strengths: np.ndarray
    known: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all that was fitted, by name."""
        return dict(vars(self))

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Ridge":
        """Return the ridge that has the `arrays`."""
        return cls(**arrays)

    def forecast(self, features: "RidgeFeatures", lead_times_hours: Sequence[int], starts: np.ndarray) -> np.ndarray:
        """Return forecasts [n, leads, T, H, W] in the units of the data, float64.

        Args:
            features: of the same targets, with the same `known`.
            starts: positions in the times of the data, increasing [n]. Pass them in blocks: all hours from PAST_HOURS
                before the first to the last are held at once. Forecasts are the same to the bit for any blocks.
        """
        climatology, deviation = features.persistence.climatology, features.persistence.deviation
        leads = [np.timedelta64(lead, "h") for lead in lead_times_hours]
        forecast = np.stack([[climatology.at(time + lead) for lead in leads] for time in features.source.times[starts]])
        past = features.summarize(features.read_anomalies(starts), starts)
        for t, known in enumerate(features.known):
            rows, columns = np.nonzero(known)
            for part in _parts(len(rows), len(starts)):
                own = self.own[t][:, :, rows[part], columns[part]]
                anomaly = np.zeros((len(leads), own.shape[2], len(starts)))
                for f, feature in enumerate(features.of_target(t, past, part)):
                    for k in range(len(leads)):
                        coefficient = self.pooled[t, k, f] + (own[k, f] if f < CELL_FEATURES else 0.0)
                        anomaly[k] += np.reshape(coefficient, (-1, 1)) * feature
                for k, values in enumerate(anomaly):
                    forecast[:, k, t, rows[part], columns[part]] += deviation[t] * values.T
        return forecast


@dataclass(frozen=True)
class Past:
    """Anomalies at and before n starts.

    Attributes:
        now: [T, cells + 1, n]. The last cell is a zero, for neighbours that a cell lacks.
        means: of the last hours, by their number, each of the same shape.
        everywhere: [T, n], the mean of `now` over the cells of the target.
        sine, cosine: [n], of the hour of day.
    """

    now: np.ndarray
    means: dict[int, np.ndarray]
    everywhere: np.ndarray
    sine: np.ndarray
    cosine: np.ndarray


class RidgeFeatures:
    """The features of a data set. Building it finds the neighbours of each cell: about a minute for 30,000 cells.

    Args:
        targets: those that `persistence` was fitted for, all of them; its climatology defines the anomalies.
        known: [T, H, W], nonzero where the target was observed in training. Only these cells have features and are
            neighbours.
    """

    def __init__(
        self, source: GriddedFields, targets: Sequence[str], persistence: DampedPersistence, known: np.ndarray
    ):
        self.source, self.targets, self.persistence, self.known = source, tuple(targets), persistence, known > 0
        self.cells = self.known.any(axis=0)
        self.count = CELL_FEATURES + 6 + 4 * (len(self.targets) - 1) + len(self.targets)
        self._columns = [np.flatnonzero(own[self.cells]) for own in self.known]  # of the target's cells among `cells`
        self._neighbours: list[list[np.ndarray]] = []
        for t, own in enumerate(self.known):
            same = next((s for s in range(t) if np.array_equal(self.known[s], own)), None)
            if same is None:
                found = _find_neighbours(source.grid.lat2d[own], source.grid.lon2d[own])
                columns = np.append(self._columns[t], self.cells.sum())
                self._neighbours.append([columns[table] for table in found])
            else:
                self._neighbours.append(self._neighbours[same])

    def read_anomalies(self, starts: np.ndarray, ahead_hours: int = 0) -> np.ndarray:
        """Return anomalies over deviation, float32 [T, cells, steps], NaN where a value or its time is missing.

        The steps are from PAST_HOURS before the first of the increasing `starts` (positions in the times of the data)
        to ahead_hours after the last.
        """
        source, step, climatology = self.source, self.source.step_hours, self.persistence.climatology
        before, last = self.steps_to(starts)[0], source.times[starts[-1]] + np.timedelta64(ahead_hours, "h")
        first = source.times[starts[0]] - np.timedelta64(before * step, "h")
        shape = (len(self.targets), int(self.cells.sum()), self.steps_to(starts)[-1] + ahead_hours // step + 1)
        anomaly = np.full(shape, np.nan, np.float32)
        scale = np.where(self.persistence.deviation > 0, self.persistence.deviation, 1.0)
        begin, end = np.searchsorted(source.times, [first, last + np.timedelta64(1, "h")])
        for piece in contiguous_blocks(np.arange(begin, end), _READ_STEPS):
            times = source.times[piece]
            usual = np.stack([climatology.at(time)[:, self.cells] for time in times])
            place = (times - first) // np.timedelta64(step, "h")
            for t, name in enumerate(self.targets):
                values = source.read(name, piece)[:, self.cells]
                anomaly[t][:, place] = _round((values - usual[:, t]) / scale[t]).T
        anomaly[~self.known[:, self.cells]] = np.nan
        return anomaly

    def steps_to(self, starts: np.ndarray) -> np.ndarray:
        """Return the steps of `read_anomalies` at which the starts are."""
        step, times = self.source.step_hours, self.source.times[starts]
        return PAST_HOURS // step - 1 + ((times - times[0]) // np.timedelta64(step, "h")).astype(np.int64)

    def summarize(self, anomaly: np.ndarray, starts: np.ndarray) -> Past:
        """Return the past of each start; anomaly: from `read_anomalies` for the same starts."""
        end, step = self.steps_to(starts) + 1, self.source.step_hours
        shape = (len(self.targets), anomaly.shape[1] + 1, len(starts))
        now, means = np.zeros(shape), {hours: np.zeros(shape) for hours in (12, 24, 240, PAST_HOURS)}
        for t, values in enumerate(anomaly):
            for part in _parts(*values.shape):
                exists = np.isfinite(values[part])
                total, number = _running_sum(np.where(exists, values[part], 0.0)), _running_sum(exists)
                for hours, mean in means.items():
                    begin = end - max(hours // step, 1)
                    counted = number[:, end] - number[:, begin]
                    mean[t, part] = (total[:, end] - total[:, begin]) / np.maximum(counted, 1)
                now[t, part] = np.where(exists[:, end - 1], values[part][:, end - 1], _round(means[12][t, part]))
        everywhere = [now[t, own].sum(axis=0) / max(len(own), 1) for t, own in enumerate(self._columns)]
        angle = 2 * np.pi * hour_of_day(self.source.times[starts]) / HOURS
        return Past(now, means, np.stack(everywhere), np.sin(angle), np.cos(angle))

    def of_target(self, t: int, past: Past, part: slice) -> Iterator[np.ndarray]:
        """Yield the features of target t, each [cells, n]; part: of the cells where it is known, in raster order."""
        own, now, day = self._columns[t][part], past.now[t], past.means[24][t]
        next_cells, *sectors = (table[part] for table in self._neighbours[t])
        yield now[own]
        yield day[own]
        yield past.means[240][t][own]
        yield _mean_over(day, next_cells)
        for cells in sectors:
            yield _mean_over(now, cells)
        yield past.means[PAST_HOURS][t][own]
        for values in (now[own], day[own]):
            yield values * past.sine
            yield values * past.cosine
        yield np.maximum(now[own], 0.0)
        for other in range(len(self.targets)):
            if other != t:
                yield past.now[other][own]
                yield past.means[24][other][own]
                yield _mean_over(past.now[other], next_cells)
                yield _mean_over(past.means[24][other], next_cells)
        for mean in past.everywhere:
            yield np.broadcast_to(mean, (len(own), len(mean)))


def fit_ridge(
    source: GriddedFields,
    targets: Sequence[str],
    lead_times_hours: Sequence[int],
    training_starts: np.ndarray,
    validation_starts: np.ndarray | None,
    mask: np.ndarray,
    persistence: DampedPersistence,
    only: Sequence[str] | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> Ridge:
    """Fit the ridge in float64.

    The data are read once, or several times if the normal equations of all targets exceed SUMS_BYTES.

    Args:
        training_starts: positions in `source.times`, increasing int64.
        validation_starts: likewise, to choose the strengths. If None, the last fifth of the training starts is held out
            to choose them; then all training starts are fitted to.
        mask: bool [H, W], the cells that count.
        persistence: fitted on the training split for all `targets`.
        only: the targets to fit. Arrays of other targets are zero, so that the arrays of processes that fit different
            targets can be added.
        on_progress: called for each block that is read.
    """
    known = mask & (persistence.climatology.filled == 0).any(axis=1)
    features = RidgeFeatures(source, targets, persistence, known)
    held_out = validation_starts is None
    if validation_starts is None:
        training_starts, validation_starts = np.split(training_starts, [len(training_starts) * 4 // 5])
    shape = (len(targets), len(lead_times_hours))
    pooled, strengths = np.zeros((*shape, features.count)), np.zeros((*shape, 2))
    own, fitted_to = np.zeros((*shape, CELL_FEATURES, *mask.shape)), np.zeros(known.shape)
    asked = [t for t, name in enumerate(targets) if only is None or name in only]
    bytes_of_target = 2 * 8 * len(lead_times_hours) * int(features.cells.sum()) * CELL_FEATURES * (features.count + 1)
    at_once = max(SUMS_BYTES // max(bytes_of_target, 1), 1)
    for chosen in (asked[first : first + at_once] for first in range(0, len(asked), at_once)):
        training = _sum_up(features, chosen, lead_times_hours, training_starts, on_progress)
        validation = _sum_up(features, chosen, lead_times_hours, validation_starts, on_progress)
        for t, fit, check in zip(chosen, training, validation, strict=True):
            strengths[t] = [_choose_strengths(fit, check, k) for k in range(shape[1])]
            if held_out:
                fit.add(check)
            for k, (for_all, for_cell) in enumerate(strengths[t]):
                pooled[t, k] = fit.solve_pooled(k, for_all)
                own[t, k][:, known[t]] = fit.solve_own(k, pooled[t, k], for_cell).T
            fitted_to[t] = known[t]
    return Ridge(pooled, own, strengths, fitted_to)


class _NormalEquations:
    """Sums over the samples of a target, for each lead: those of all cells and those of each cell."""

    def __init__(self, leads: int, features: int, cells: int):
        self.squares, self.products = np.zeros((leads, features, features)), np.zeros((leads, features))
        self.total = np.zeros(leads)  # of the squared anomalies at the lead
        self.own_squares = np.zeros((leads, cells, CELL_FEATURES, features))
        self.own_products = np.zeros((leads, cells, CELL_FEATURES))

    def add_samples(self, part: slice, x: np.ndarray, y: np.ndarray) -> None:
        """Add the features x [cells, n, features] and anomalies at the leads y [leads, cells, n], NaN where missing."""
        flat = x.reshape(-1, x.shape[2])
        for k, anomaly in enumerate(y):
            exists = np.isfinite(anomaly)
            value = np.where(exists, anomaly, 0.0)
            counted = x * exists[..., None]
            self.squares[k] += counted.reshape(flat.shape).T @ flat
            self.products[k] += flat.T @ value.ravel()
            self.total[k] += np.square(value).sum()
            of_cell = counted[..., :CELL_FEATURES].transpose(0, 2, 1)
            self.own_squares[k, part] += of_cell @ x
            self.own_products[k, part] += (of_cell @ value[..., None])[..., 0]

    def add(self, other: "_NormalEquations") -> None:
        """Add the samples of `other`."""
        for name, sums in vars(self).items():
            sums += getattr(other, name)

    def solve_pooled(self, k: int, strength: float) -> np.ndarray:
        """Return the pooled coefficients [features] of a lead."""
        return np.linalg.solve(self.squares[k] + strength * np.eye(len(self.squares[k])), self.products[k])

    def solve_own(self, k: int, pooled: np.ndarray, strength: float) -> np.ndarray:
        """Return what each cell adds to the pooled coefficients: [cells, CELL_FEATURES]."""
        if np.isinf(strength):
            return np.zeros_like(self.own_products[k])
        matrix = self.own_squares[k, :, :, :CELL_FEATURES] + strength * np.eye(CELL_FEATURES)
        return np.linalg.solve(matrix, self._left(k, pooled)[..., None])[..., 0]

    def error(self, k: int, pooled: np.ndarray, own: np.ndarray) -> float:
        """Return the sum of the squared errors of forecasts with these coefficients."""
        error = self.total[k] - 2 * pooled @ self.products[k] + pooled @ self.squares[k] @ pooled
        explained = np.einsum("cij,cj->ci", self.own_squares[k, :, :, :CELL_FEATURES], own)
        return float(error + np.sum(own * (explained - 2 * self._left(k, pooled))))

    def _left(self, k: int, pooled: np.ndarray) -> np.ndarray:
        """Return the cells' products with what the pooled coefficients leave: [cells, CELL_FEATURES]."""
        return self.own_products[k] - self.own_squares[k] @ pooled


def _sum_up(
    features: RidgeFeatures,
    chosen: Sequence[int],
    lead_times_hours: Sequence[int],
    starts: np.ndarray,
    on_progress: Callable[[], None],
) -> list[_NormalEquations]:
    """Return the normal equations of the targets with indices `chosen` over one in EVERY of the starts."""
    known = [int(features.known[t].sum()) for t in chosen]
    sums = [_NormalEquations(len(lead_times_hours), features.count, cells) for cells in known]
    length = max(BLOCK_VALUES // max(int(features.known.sum()), 1), _SHORTEST_BLOCK)
    starts = starts[::EVERY]
    hours = features.source.times[starts].astype("datetime64[h]").astype(np.int64)
    for block in np.split(starts, np.flatnonzero(np.diff(hours // length)) + 1) if len(starts) else ():
        on_progress()
        anomaly = features.read_anomalies(block, max(lead_times_hours))
        past = features.summarize(anomaly, block)
        place = features.steps_to(block) + np.array(lead_times_hours)[:, None] // features.source.step_hours
        for t, found, cells in zip(chosen, sums, known, strict=True):
            at_lead = anomaly[t][features.known[t][features.cells]]
            for part in _parts(cells, len(block)):
                x = np.stack(list(features.of_target(t, past, part)), axis=2)
                found.add_samples(part, x, at_lead[part][:, place].transpose(1, 0, 2))
    return sums


def _choose_strengths(training: _NormalEquations, validation: _NormalEquations, k: int) -> tuple[float, float]:
    """Return the strengths with the least validation error at lead k: the pooled one, then that of the cells."""
    none = np.zeros_like(training.own_products[k])
    solutions = [training.solve_pooled(k, strength) for strength in POOLED_STRENGTHS]
    errors = [validation.error(k, pooled, none) for pooled in solutions]
    best = int(np.argmin(errors))
    pooled = solutions[best]
    own = [validation.error(k, pooled, training.solve_own(k, pooled, strength)) for strength in CELL_STRENGTHS]
    return POOLED_STRENGTHS[best], CELL_STRENGTHS[int(np.argmin(own))]


def _find_neighbours(lat: np.ndarray, lon: np.ndarray) -> list[np.ndarray]:
    """Return tables [N, count] of the next cells, then of the sectors: each ring of north, of east, of south, of west.

    lat, lon: degrees [N]. -1 is no cell. Distances are great circles, directions initial bearings.
    """
    lat, lon, count = np.deg2rad(lat), np.deg2rad(lon), len(lat)
    place = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)
    rings = list(itertools.pairwise(RINGS_KM))
    tables = [np.full((count, FARTHEST - NEAREST), -1)]
    tables += [np.full((count, CELLS_OF_SECTOR), -1) for _ in range(4 * len(rings))]
    for i in range(count):
        offset = place - place[i]
        # rounded to metres, so that distances that are equal on the grid tie
        km = np.round(2 * EARTH_RADIUS_KM * np.arcsin(np.minimum(np.sqrt(np.square(offset).sum(axis=1)) / 2, 1)), 3)
        farthest = np.partition(km, min(FARTHEST, count - 1))[min(FARTHEST, count - 1)]
        near = np.flatnonzero(km <= max(farthest, RINGS_KM[-1]))
        near = near[near != i]
        near = near[np.argsort(km[near], kind="stable")]
        beyond = near[NEAREST:FARTHEST]
        tables[0][i, : len(beyond)] = beyond
        east = offset[near] @ np.array([-np.sin(lon[i]), np.cos(lon[i]), 0])
        north = offset[near] @ np.array(
            [-np.sin(lat[i]) * np.cos(lon[i]), -np.sin(lat[i]) * np.sin(lon[i]), np.cos(lat[i])]
        )
        quarter = np.floor((np.rad2deg(np.arctan2(east, north)) + 45) % 360 / 90)
        for number, table in enumerate(tables[1:]):
            inner, outer = rings[number % len(rings)]
            sector = near[(quarter == number // len(rings)) & (km[near] > inner) & (km[near] <= outer)]
            if len(sector) > CELLS_OF_SECTOR:
                sector = sector[np.arange(CELLS_OF_SECTOR) * (len(sector) - 1) // (CELLS_OF_SECTOR - 1)]
            table[i, : len(sector)] = sector
    return tables


def _mean_over(values: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Return the mean [n, m] of `values` [cells + 1, m] over `cells` [n, count]; the last cell does not count."""
    total = np.zeros((len(cells), values.shape[1]))
    for column in cells.T:
        total += values[column]
    return total / np.maximum((cells < len(values) - 1).sum(axis=1), 1)[:, None]


def _parts(cells: int, values_of_cell: int) -> Iterator[slice]:
    """Split cells into parts with at most _PART_VALUES values each."""
    length = max(_PART_VALUES // max(values_of_cell, 1), 1)
    for first in range(0, cells, length):
        yield slice(first, min(first + length, cells))


def _running_sum(values: np.ndarray) -> np.ndarray:
    """Return [n, m + 1]: the sums of the first 0, 1, ... m values of each row."""
    total = np.zeros((values.shape[0], values.shape[1] + 1))
    np.cumsum(values, axis=1, out=total[:, 1:])
    return total


def _round(anomaly: np.ndarray) -> np.ndarray:
    return np.rint(anomaly * _EXACT) / _EXACT
