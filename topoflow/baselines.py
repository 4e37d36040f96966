"""Baseline forecasts without a network, fitted on the training split.

persistence         the present value
climatology         the training mean of the cell by hour of day
damped persistence  climatology plus the present anomaly times the cell's slope sum(a_t a_t+L) / sum(a_t^2), summed
                    over the training start times t for which the longest lead fits and both anomalies exist
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

HOURS = 24
BLOCK_HOURS = 480
"""Time steps read at once while fitting."""
DEGENERATE = 1e-9
"""Squared anomalies below this fraction of the squared values are rounding error: the slope of the cell is 0."""


class Fields(Protocol):
    """The part of a data source that fitting uses."""

    times: np.ndarray
    step_hours: int

    def read(self, name: str, indices: np.ndarray) -> np.ndarray:
        """Return physical values [n, H, W], NaN where missing."""
        ...


@dataclass(frozen=True)
class Baselines:
    """Fitted baselines of some targets, in the units of the source, float64.

    Attributes:
        climatology: [targets, 24, H, W] by hour of day. A cell without training values at an hour gets its mean over
            all hours; a cell without any training value gets the mean over cells at that hour, or over everything if
            there is none either. NaN only for a target without any training value.
        filled: [targets, 24, H, W] 1 where the climatology is not the cell's own at that hour, else 0.
        slope: [targets, leads, H, W] 0 where the cell has no pair of values in training.
    """

    climatology: np.ndarray
    filled: np.ndarray
    slope: np.ndarray

    def forecast(self, present: np.ndarray, hours: np.ndarray, leads: np.ndarray, lead_hours: np.ndarray):
        """Return the forecast of each baseline, and where the climatology is not the cell's own.

        Args:
            present: [B, targets, H, W] values at the start, NaN where missing.
            hours, leads, lead_hours: [B] each: hour of day of the start, index of the lead, its length in hours.

        Returns:
            {name: [B, targets, H, W] float64}, NaN where missing, and bool of the same shape.
        """
        at_target = (hours + lead_hours) % HOURS
        climatology = np.moveaxis(self.climatology[:, at_target], 1, 0)
        anomaly = present - np.moveaxis(self.climatology[:, hours], 1, 0)
        damped = climatology + np.moveaxis(self.slope[:, leads], 1, 0) * anomaly
        forecasts = {"persistence": present, "climatology": climatology, "damped_persistence": damped}
        return forecasts, np.moveaxis(self.filled[:, at_target], 1, 0) > 0


def hour_of_day(times: np.ndarray) -> np.ndarray:
    """Return the hour 0-23 of datetime64 times, int64 of the same shape, in the time zone of the data."""
    return times.astype("datetime64[h]").astype(np.int64) % HOURS


def fit_baselines(
    source: Fields,
    targets: Sequence[str],
    lead_times_hours: Sequence[int],
    training_times: np.ndarray,
    training_starts: np.ndarray,
    mask: np.ndarray,
    only: Sequence[str] | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> Baselines:
    """Fit all baselines in one pass over the training split per target.

    Args:
        training_times: indices of all training times in `source.times`, increasing int64.
        training_starts: likewise of the start times; from each start to its longest lead, no time is missing and all
            are in `training_times`.
        mask: bool [H, W], the cells to fit.
        only: the targets to fit. Arrays of other targets stay zero, so that the results of ranks that fit different
            targets can be added.
        on_progress: called for each block that is read.
    """
    names = targets if only is None else only
    shape = (len(targets), HOURS, *mask.shape)
    climatology, filled = np.zeros(shape), np.zeros(shape)
    slope = np.zeros((len(targets), len(lead_times_hours), *mask.shape))
    for t, name in enumerate(targets):
        if name in names:
            fit = _CellSums(source.times, lead_times_hours, source.step_hours, training_starts, int(mask.sum()))
            for indices in contiguous_blocks(training_times, BLOCK_HOURS):
                on_progress()
                fit.add(indices, source.read(name, indices)[:, mask].astype(np.float64))
            climatology[t][:, mask], filled[t][:, mask] = fit.climatology()
            slope[t][:, mask] = fit.slope()
    return Baselines(climatology, filled, slope)


def contiguous_blocks(indices: np.ndarray, length: int) -> Iterator[np.ndarray]:
    """Split increasing `indices` [n] at gaps, and into blocks of at most `length`."""
    for run in np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1):
        for first in range(0, len(run), length):
            yield run[first : first + length]


class _CellSums:
    """Sums per cell and hour of day that give climatology and slopes in a single pass over the data.

    Values are taken relative to the cell's first one to limit rounding errors. The last rows of each block are kept in
    `tail` for pairs of a start in one block and a target in the next.
    """

    def __init__(self, times: np.ndarray, leads: Sequence[int], step_hours: int, starts: np.ndarray, cells: int):
        self.leads, self.lead_steps = leads, [lead // step_hours for lead in leads]
        self.hours = hour_of_day(times)
        self.is_start = np.zeros(len(times), bool)
        self.is_start[starts] = True
        self.shift = np.full(cells, np.nan)
        self.count, self.total = np.zeros((2, HOURS, cells))
        # by lead, start hour and cell, over pairs that both exist: number, x, y, x x, x y (x at start, y at target)
        self.pairs = np.zeros((len(leads), HOURS, 5, cells))
        self.tail_indices = np.zeros(0, np.int64)
        self.tail = np.zeros((2, 0, cells))

    def add(self, indices: np.ndarray, values: np.ndarray) -> None:
        """Add values [n, cells] float64, NaN where missing, at consecutive time indices [n]."""
        exists = np.isfinite(values)
        first = np.take_along_axis(values, exists.argmax(axis=0)[None], axis=0)[0]
        self.shift = np.where(np.isnan(self.shift), first, self.shift)
        x, weight = np.where(exists, values - self.shift, 0.0), exists.astype(np.float64)
        for hour in range(HOURS):
            rows = self.hours[indices] == hour
            self.count[hour] += weight[rows].sum(axis=0)
            self.total[hour] += x[rows].sum(axis=0)
        if len(self.tail_indices) and self.tail_indices[-1] + 1 == indices[0]:
            window, x = np.concatenate([self.tail_indices, indices]), np.concatenate([self.tail[0], x])
            weight = np.concatenate([self.tail[1], weight])
        else:
            window = indices
        self._add_pairs(window, x, weight, indices[0])
        keep = max(self.lead_steps)
        self.tail_indices, self.tail = window[-keep:], np.stack([x[-keep:], weight[-keep:]])

    def _add_pairs(self, window: np.ndarray, x: np.ndarray, weight: np.ndarray, first_target: int) -> None:
        starts = window[self.is_start[window]]
        for k, lead in enumerate(self.lead_steps):
            fits = starts[(starts + lead >= first_target) & (starts + lead <= window[-1])]
            for hour in range(HOURS):
                a = fits[self.hours[fits] == hour] - window[0]
                xa, wa, xb, wb = x[a], weight[a], x[a + lead], weight[a + lead]
                for i, (left, right) in enumerate(((wa, wb), (xa, wb), (wa, xb), (xa * xa, wb), (xa, xb))):
                    self.pairs[k, hour, i] += np.einsum("tc,tc->c", left, right)

    def climatology(self) -> tuple[np.ndarray, np.ndarray]:
        """Return means [24, cells], and 1 where a mean is not the cell's own at that hour."""
        with np.errstate(invalid="ignore"):
            own = self.shift + self.total / self.count
            cell_mean = self.shift + self.total.sum(axis=0) / self.count.sum(axis=0)
        missing = ~(self.count > 0)
        hour_mean = np.full(HOURS, _mean(cell_mean))
        for hour in range(HOURS):
            if not missing[hour].all():
                hour_mean[hour] = _mean(own[hour])
        means = np.where(missing, np.where(np.isnan(cell_mean), hour_mean[:, None], cell_mean), own)
        return means, missing.astype(np.float64)

    def slope(self) -> np.ndarray:
        """Return slopes [leads, cells]: regression through the origin of the target's anomaly on the start's."""
        means = np.where(self.count > 0, self.total / np.maximum(self.count, 1), 0.0)
        slopes = np.zeros((len(self.leads), means.shape[1]))
        for k, lead in enumerate(self.leads):
            n, x, y, xx, xy = np.moveaxis(self.pairs[k], 1, 0)
            at_target = np.roll(means, -lead, axis=0)
            products = (xy - at_target * x - means * y + n * means * at_target).sum(axis=0)
            squares = (xx - 2 * means * x + n * means**2).sum(axis=0)
            usable = squares > DEGENERATE * (xx + n * means**2).sum(axis=0)
            slopes[k][usable] = products[usable] / squares[usable]
        return slopes


def _mean(values: np.ndarray) -> float:
    """Return the mean of the finite values, NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")
