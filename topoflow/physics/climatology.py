"""The climatology of the targets: what is usual in a cell at an hour of the day and, where known, of the year.

hourly      the training mean of the cell by hour of day
seasonal    least squares on 24 indicators of the hour of day, and on cosine and sine of the first two annual harmonics,
            each alone and times those of the first two daily ones; the annual coefficients are shrunk towards 0
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

HOURS = 24
BLOCK_HOURS = 480
"""Time steps read at once while fitting."""
ANNUAL = DAILY = 2
"""Number of harmonics of the year and, in products with them, of the day."""
SHRINKAGE_HOURS = 300.0
"""An annual coefficient is shrunk as if so many hours without it had been observed too; by validation on China 2019."""
ANNUAL_TERMS = 2 * ANNUAL * (1 + 2 * DAILY)
LONGEST_GAP_DAYS = 60
"""The seasonal climatology needs training hours in each stretch of the year that is longer than this."""
_CELLS_AT_ONCE = 2048


class Fields(Protocol):
    """The part of a data set that fitting uses."""

    times: np.ndarray
    step_hours: int

    def read(self, name: str, indices: np.ndarray) -> np.ndarray:
        """Return physical values [n, H, W], NaN where missing."""
        ...


def hour_of_day(times: np.ndarray | np.datetime64) -> np.ndarray:
    """Return the hour 0-23 of datetime64 times, int64 of the same shape, in the time zone of the data."""
    return times.astype("datetime64[h]").astype(np.int64) % HOURS


def covers_the_year(times: np.ndarray) -> bool:
    """Return whether `times` (datetime64 [n], not empty) leave no long stretch of the year out, whatever the year."""
    days = np.unique(_day_of_year(times).astype(np.int64))
    return bool(np.diff(days, append=days[0] + 366).max() <= LONGEST_GAP_DAYS)


def contiguous_blocks(indices: np.ndarray, length: int) -> Iterator[np.ndarray]:
    """Split increasing `indices` [n] at gaps, and into blocks of at most `length`."""
    for run in np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1):
        for first in range(0, len(run), length):
            yield run[first : first + length]


@dataclass(frozen=True)
class Climatology:
    """The usual value of each target, in the units of the data, by cell and time.

    Attributes:
        hourly: [T, 24, H, W] by hour of day. A cell without training values at an hour has its mean over all hours; a
            cell without any has the mean over cells at that hour, or over everything if there is none either. NaN only
            for a target without any training value.
        annual: [T, K, H, W], coefficients of the annual terms: for cosine and sine of each harmonic in turn those times
            1, cosine and sine of the daily ones; K is 0 if the climatology is hourly.
        filled: [T, 24, H, W] 1 where `hourly` is not the cell's own at that hour, else 0.
    """

    hourly: np.ndarray
    annual: np.ndarray
    filled: np.ndarray

    @property
    def is_seasonal(self) -> bool:
        return self.annual.shape[1] > 0

    @functools.cached_property
    def _by_hour(self) -> np.ndarray:
        """[24, 1 + 2 * ANNUAL, T * H * W]: the terms of the day summed for each hour, so that few are left."""
        shape = self.hourly.shape
        table = [np.moveaxis(self.hourly, 1, 0).reshape(HOURS, 1, -1)]
        if self.is_seasonal:
            of_day = _daily_terms(np.arange(HOURS)).astype(self.annual.dtype)
            terms = self.annual.reshape(shape[0], 2 * ANNUAL, of_day.shape[1], *shape[2:])
            summed = np.einsum("dk,tjkyx->djtyx", of_day, terms)
            table.append(summed.reshape(HOURS, 2 * ANNUAL, -1))
        return np.ascontiguousarray(np.concatenate(table, axis=1))

    @functools.cached_property
    def _by_place(self) -> np.ndarray:
        """[T * H * W, 24 + K], `hourly` and `annual`: what is known of a place is one stretch of memory."""
        terms = np.concatenate([self.hourly, self.annual], axis=1)
        return np.ascontiguousarray(np.moveaxis(terms, 1, -1)).reshape(-1, terms.shape[1])

    def at(self, time: np.datetime64) -> np.ndarray:
        """Return the usual values [T, H, W] at a time, in the precision of `hourly`; a new array."""
        hour = int(time.astype("datetime64[h]").astype(np.int64))
        table = self._by_hour[hour % HOURS]
        weights = _weights_of(hour)[: len(table)].astype(table.dtype)
        # a matrix product would start the threads of numpy's BLAS, which take the processors of the training step
        return np.einsum("k,kn->n", weights, table).reshape(-1, *self.hourly.shape[2:])

    def at_places(self, times: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return values [n, len(places)] of `at` at `times` [n]; places: positions in its T * H * W values."""
        terms = np.ascontiguousarray(self._by_place.take(places, axis=0).T)  # [24 + K, len(places)]
        hours = times.astype("datetime64[h]").astype(np.int64)
        values = terms[hours % HOURS]
        if self.is_seasonal and len(hours):
            factors = np.stack([_annual_terms_of(hour) for hour in hours.tolist()])
            values += np.einsum("nk,kp->np", factors.astype(terms.dtype), terms[HOURS:])
        return values

    def filled_at(self, time: np.datetime64) -> np.ndarray:
        """Return where the values of `at` are not the cell's own: bool [T, H, W]."""
        return self.filled[:, int(hour_of_day(time))] > 0


def fit_climatologies(
    source: Fields,
    name: str,
    times: np.ndarray,
    mask: np.ndarray,
    seasonal: bool,
    on_progress: Callable[[], None] = lambda: None,
) -> list[Climatology]:
    """Fit the hourly climatology of one target and, if asked for, the seasonal one, in float64; 0 outside the mask.

    Args:
        times: positions of the training times in `source.times`, increasing int64.
        mask: bool [H, W], the cells to fit.
        on_progress: called for each block that is read.
    """
    cells = int(mask.sum())
    terms = 1 + (2 * ANNUAL if seasonal else 0)
    shift = np.full(cells, np.nan)  # each cell's first value: sums of differences to it are precise
    squares, products = np.zeros((HOURS, terms, terms, cells)), np.zeros((HOURS, terms, cells))
    for indices in contiguous_blocks(times, BLOCK_HOURS):
        on_progress()
        values = source.read(name, indices)[:, mask].astype(np.float64)
        exists = np.isfinite(values)
        first = np.take_along_axis(values, exists.argmax(axis=0)[None], axis=0)[0]
        shift = np.where(np.isnan(shift), first, shift)
        x, weight = np.where(exists, values - shift, 0.0), exists.astype(np.float64)
        harmonics, hours = np.ones((len(indices), terms)), hour_of_day(source.times[indices])
        if seasonal:
            harmonics[:, 1:] = _annual_harmonics(source.times[indices])
        for hour in np.unique(hours):
            rows = hours == hour
            products[hour] += harmonics[rows].T @ x[rows]
            pairs = harmonics[rows, :, None] * harmonics[rows, None, :]
            squares[hour] += (pairs.reshape(len(pairs), -1).T @ weight[rows]).reshape(terms, terms, cells)
    count, total = squares[:, 0, 0], products[:, 0]
    found = [_complete(shift, count, total, np.zeros((0, cells)), mask)]
    if seasonal:
        annual = _solve_annual(squares, products)
        by_hour = np.einsum("dk,jkc->djc", _daily_terms(np.arange(HOURS)), annual.reshape(2 * ANNUAL, -1, cells))
        rest = total - np.einsum("djc,djc->dc", squares[:, 0, 1:], by_hour)  # what the annual terms do not explain
        found.append(_complete(shift, count, rest, annual, mask))
    return found


def _complete(
    shift: np.ndarray, count: np.ndarray, total: np.ndarray, annual: np.ndarray, mask: np.ndarray
) -> Climatology:
    """Return the climatology with a value for each cell of the mask and hour.

    Args:
        shift: [cells]. count, total: [24, cells], number of values and sum of their differences to `shift`.
        annual: [K, cells].
    """
    missing = ~(count > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        own = shift + total / count
        cell_mean = shift + total.sum(axis=0) / count.sum(axis=0)
    seen = ~np.isnan(cell_mean)
    hour_mean = np.full(HOURS, _mean(cell_mean))
    for hour in range(HOURS):
        if not missing[hour].all():
            hour_mean[hour] = _mean(own[hour])
    hourly = np.where(missing, np.where(seen, cell_mean, hour_mean[:, None]), own)
    if seen.any():
        annual[:, ~seen] = annual[:, seen].mean(axis=1, keepdims=True)
    fields = [np.zeros((1, len(values), *mask.shape)) for values in (hourly, annual, missing)]
    for field, values in zip(fields, (hourly, annual, missing), strict=True):
        field[0][:, mask] = values
    return Climatology(*fields)


def _solve_annual(squares: np.ndarray, products: np.ndarray) -> np.ndarray:
    """Return annual coefficients [K, cells] of the least squares with a mean for each hour of day.

    Args:
        squares: [24, 1 + J, 1 + J, cells], sums of products of the annual harmonics (after 1) over the cell's values.
        products: [24, 1 + J, cells], sums of the harmonics times the value.
    """
    of_day = _daily_terms(np.arange(HOURS))
    cells, size = products.shape[2], 2 * ANNUAL * of_day.shape[1]
    found = np.zeros((size, cells))
    for first in range(0, cells, _CELLS_AT_ONCE):
        part = slice(first, first + _CELLS_AT_ONCE)
        s, p = squares[..., part], products[..., part]
        # the mean of each hour is eliminated (Schur complement): what is left concerns the annual terms alone
        inverse = np.divide(1.0, s[:, 0, 0], out=np.zeros_like(s[:, 0, 0]), where=s[:, 0, 0] > 0)
        left = s[:, 1:, 1:] - np.einsum("dic,djc,dc->dijc", s[:, 1:, 0], s[:, 0, 1:], inverse)
        right = p[:, 1:] - np.einsum("dic,dc,dc->dic", s[:, 1:, 0], p[:, 0], inverse)
        matrix = np.einsum("dk,dl,dijc->cikjl", of_day, of_day, left, optimize=True).reshape(-1, size, size)
        vector = np.einsum("dk,dic->cik", of_day, right, optimize=True).reshape(-1, size, 1)
        found[:, part] = np.linalg.solve(matrix + SHRINKAGE_HOURS * np.eye(size), vector)[..., 0].T
    return found


def _mean(values: np.ndarray) -> float:
    """Return the mean of the finite values, NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _day_of_year(times: np.ndarray | np.datetime64) -> np.ndarray:
    """Return the days since the year began, with their fraction."""
    times = np.asarray(times).astype("datetime64[h]")
    return (times - times.astype("datetime64[Y]").astype("datetime64[h]")).astype(np.float64) / HOURS


def _annual_harmonics(times: np.ndarray | np.datetime64) -> np.ndarray:
    """Return cosine and sine of each annual harmonic: [..., 2 * ANNUAL]."""
    return _harmonics(2 * np.pi * _day_of_year(times) / 365.25, ANNUAL)


@functools.lru_cache(2**16)
def _weights_of(hour: int) -> np.ndarray:
    """Return the weights of the terms in `Climatology._by_hour` at an hour since 1970: [1 + 2 * ANNUAL]."""
    return np.concatenate([[1.0], _annual_harmonics(np.datetime64(hour, "h"))])


@functools.lru_cache(2**16)
def _annual_terms_of(hour: int) -> np.ndarray:
    """Return the factors of `Climatology.annual` at an hour since 1970: [ANNUAL_TERMS]."""
    return np.outer(_weights_of(hour)[1:], _daily_terms(np.array(hour % HOURS))).ravel()


def _daily_terms(hours: np.ndarray) -> np.ndarray:
    """Return 1, then cosine and sine of each daily harmonic: [..., 1 + 2 * DAILY]."""
    turns = _harmonics(2 * np.pi * np.asarray(hours) / HOURS, DAILY)
    return np.concatenate([np.ones_like(turns[..., :1]), turns], axis=-1)


def _harmonics(angle: np.ndarray, count: int) -> np.ndarray:
    return np.stack([wave(n * angle) for n in range(1, count + 1) for wave in (np.cos, np.sin)], axis=-1)
