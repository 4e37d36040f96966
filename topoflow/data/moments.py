"""Count, mean and spread of values, in pieces that are merged in a fixed order.

A piece is one day of one variable; prepared data come with the moments of each day. The same pieces, merged in the same
order, give bit-identical results.
"""

from dataclasses import dataclass

import numpy as np

_DAY = np.timedelta64(24, "h")


@dataclass(frozen=True)
class Moments:
    """Number, mean and sum of squared deviations from the mean of the values that are not missing, in float64."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of both sets together (Chan, Golub and LeVeque 1979): precise for a large mean."""
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        count, step = self.count + other.count, other.mean - self.mean
        squares = self.squares + (other.squares + step**2 * self.count * other.count / count)
        return Moments(count, self.mean + step * other.count / count, squares)

    @property
    def std(self) -> float:
        """The (population) standard deviation; nan without a value."""
        return float(np.sqrt(self.squares / self.count)) if self.count else float("nan")


def moments_of(values: np.ndarray) -> Moments:
    """Return the moments of an array of any shape, NaN where a value is missing."""
    present = values[~np.isnan(values)].astype(np.float64)
    if present.size == 0:
        return Moments()
    mean = float(present.mean())
    present -= mean
    return Moments(present.size, mean, float(np.square(present, out=present).sum()))


def day_pieces(times: np.ndarray, indices: np.ndarray) -> list[np.ndarray]:
    """Increasing positions `indices` [n] in `times` (datetime64[h]), cut between days (UTC)."""
    if len(indices) == 0:
        return []
    days = times[indices].astype("datetime64[D]")
    return np.split(indices, np.flatnonzero(days[1:] != days[:-1]) + 1)


def is_whole_day(times: np.ndarray, piece: np.ndarray) -> bool:
    """Whether a piece of `day_pieces` has all hours that `times` have of its day."""
    day = times[piece[0]].astype("datetime64[D]").astype(times.dtype)
    first, last = np.searchsorted(times, [day, day + _DAY])
    return len(piece) == last - first
