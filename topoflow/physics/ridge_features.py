"""The features of a ridge regression: past anomalies of a cell and of the cells around it.

Anomalies are in units of the target's deviation. The features of a cell, in order:
  - its anomaly now, its means of the last 24 and 240 h, the 24 h mean of the 9th to 39th nearest cells, and the anomaly
    now of the cells north, east, south and west of it in two rings of distance: CELL_FEATURES so far;
  - its mean of the last 720 h, its anomaly now and 24 h mean times sine and cosine of the hour of day, and its anomaly
    now where that is positive;
  - of each other target the anomaly now and the 24 h mean, of the cell and of its 9th to 39th nearest cells; of each
    target the anomaly now of all cells.
A missing value now is replaced by the mean of the last 12 h; a mean of no values is 0.
"""

import itertools
from collections.abc import Iterator, Sequence
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
BLOCK_VALUES = 10_000_000
"""Limit on the values that are read at once."""
_SHORTEST_BLOCK, _READ_STEPS, _PART_VALUES = 480, 48, 2**17
_ARRAYS_OF_PAST = 5
_EXACT = 2.0**16
"""Anomalies are rounded to multiples of 1 / _EXACT, so that their sums are exact in any order."""


class GriddedFields(Fields, Protocol):
    """The part of a data set that the ridge uses."""

    grid: Grid


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
        self.columns = [np.flatnonzero(own[self.cells]) for own in self.known]  # of the target's cells among `cells`
        self._neighbours: list[list[np.ndarray]] = []
        for t, own in enumerate(self.known):
            same = next((s for s in range(t) if np.array_equal(self.known[s], own)), None)
            if same is None:
                found = _find_neighbours(source.grid.lat2d[own], source.grid.lon2d[own])
                columns = np.append(self.columns[t], self.cells.sum())
                self._neighbours.append([columns[table] for table in found])
            else:
                self._neighbours.append(self._neighbours[same])

    def blocks(self, starts: np.ndarray) -> Iterator[np.ndarray]:
        """Split increasing `starts` (positions in the times of the data) into blocks that can be held at once: rows."""
        of_step = max(int(self.known.sum()), 1)
        hours = self.source.times[starts].astype("datetime64[h]").astype(np.int64)
        length = max(BLOCK_VALUES // of_step, _SHORTEST_BLOCK)
        for rows in np.split(np.arange(len(starts)), np.flatnonzero(np.diff(hours // length)) + 1):
            if len(rows):
                count = -(-len(rows) * of_step * _ARRAYS_OF_PAST // BLOCK_VALUES)
                yield from np.array_split(rows, min(count, len(rows)))

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
            for part in parts(*values.shape):
                exists = np.isfinite(values[part])
                total, number = _running_sum(np.where(exists, values[part], 0.0)), _running_sum(exists)
                for hours, mean in means.items():
                    begin = end - max(hours // step, 1)
                    counted = number[:, end] - number[:, begin]
                    mean[t, part] = (total[:, end] - total[:, begin]) / np.maximum(counted, 1)
                now[t, part] = np.where(exists[:, end - 1], values[part][:, end - 1], _round(means[12][t, part]))
        everywhere = [now[t, own].sum(axis=0) / max(len(own), 1) for t, own in enumerate(self.columns)]
        angle = 2 * np.pi * hour_of_day(self.source.times[starts]) / HOURS
        return Past(now, means, np.stack(everywhere), np.sin(angle), np.cos(angle))

    def of_target(self, t: int, past: Past, part: slice) -> Iterator[np.ndarray]:
        """Yield the features of target t, each [cells, n]; part: of the cells where it is known, in raster order."""
        own, now, day = self.columns[t][part], past.now[t], past.means[24][t]
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


def parts(cells: int, values_of_cell: int) -> Iterator[slice]:
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
