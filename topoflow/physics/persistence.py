"""Damped persistence: the climatology plus the present anomaly times the cell's slope for the lead.

The slope is that of a regression through the origin, sum(a_t a_t+L) / sum(a_t^2), summed over the training start times
t for which the longest lead fits and both anomalies exist.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from topoflow.physics.climatology import (
    ANNUAL_TERMS,
    BLOCK_HOURS,
    HOURS,
    Climatology,
    Fields,
    contiguous_blocks,
    fit_climatologies,
)

DEGENERATE = 1e-18
"""Squared anomalies below this fraction of the squared values are rounding error: the slope of the cell is 0."""


@dataclass(frozen=True)
class DampedPersistence:
    """Damped persistence of each target, in the units of the data.

    Attributes:
        climatology: about which there are anomalies.
        slope: [T, leads, H, W]; 0 where a cell has no pair of values in training.
        squares: [T, 2], sum of the squared anomalies at the training starts and their number.
        lead_times_hours: [leads].
    """

    climatology: Climatology
    slope: np.ndarray
    squares: np.ndarray
    lead_times_hours: np.ndarray

    @property
    def deviation(self) -> np.ndarray:
        """The root mean square anomaly of each target in training: [T]."""
        return np.sqrt(self.squares[:, 0] / np.maximum(self.squares[:, 1], 1))

    @property
    def known(self) -> np.ndarray:
        """Where a target was observed in training: bool [H, W], True outside the mask of the fit."""
        return (self.climatology.filled == 0).any(axis=(0, 1))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all that was fitted, by name."""
        fitted = {name: getattr(self.climatology, name) for name in ("hourly", "annual", "filled")}
        return {**fitted, **{name: getattr(self, name) for name in ("slope", "squares", "lead_times_hours")}}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "DampedPersistence":
        """Return what has the `arrays`."""
        climatology = Climatology(arrays["hourly"], arrays["annual"], arrays["filled"])
        return cls(climatology, arrays["slope"], arrays["squares"], arrays["lead_times_hours"])

    def usual(self, time: np.datetime64) -> np.ndarray:
        """Return the values [T, H, W] of the climatology at a time."""
        return self.climatology.at(time)

    def usual_at_places(self, times: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return its values [n, len(places)] at `times` [n]; places: positions in the T * H * W values of `usual`."""
        return self.climatology.at_places(times, places)

    def forecast(self, anomaly: np.ndarray, target: np.datetime64, lead: int) -> np.ndarray:
        """Return the forecast [T, H, W] for the time `target`, the lead with index `lead`; anomaly: at the start."""
        forecast = self.climatology.at(target)
        for usual, slope, present in zip(forecast, self.slope[:, lead], anomaly, strict=True):
            usual += slope * present  # target by target, so that the product stays in the processor's cache
        return forecast

    def forecasts_from(
        self,
        source: Fields,
        targets: Sequence[str],
        starts: np.ndarray,
        in_training: bool,
        on_progress: Callable[[], None],
    ) -> "ForecastsFromAnomalies":
        """Return what makes forecasts from the starts; only `source` matters."""
        return ForecastsFromAnomalies(self, source.times)


@dataclass(frozen=True)
class ForecastsFromAnomalies:
    """Makes forecasts from positions in `times`."""

    persistence: DampedPersistence
    times: np.ndarray

    def forecast(self, start: int, lead: int, anomaly: np.ndarray) -> np.ndarray:
        """Return the forecast [T, H, W]; lead: its index, anomaly: at the start."""
        hours = np.timedelta64(int(self.persistence.lead_times_hours[lead]), "h")
        return self.persistence.forecast(anomaly, self.times[start] + hours, lead)


def fit_damped_persistence(
    source: Fields,
    targets: Sequence[str],
    lead_times_hours: Sequence[int],
    training_times: np.ndarray,
    training_starts: np.ndarray,
    mask: np.ndarray,
    seasonal: bool,
    only: Sequence[str] | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> list[DampedPersistence]:
    """Fit damped persistence about the hourly climatology and, if asked for, about the seasonal one, in float64.

    Each target is read twice.

    Args:
        training_times: positions of all training times in `source.times`, increasing int64.
        training_starts: likewise of the start times; from each to its longest lead no time is missing.
        mask: bool [H, W], the cells to fit; the others are 0.
        only: the targets to fit. Arrays of other targets are zero, so that the arrays of processes that fit different
            targets can be added.
        on_progress: called for each block that is read.
    """
    kinds = []
    for annual_terms in (0, ANNUAL_TERMS) if seasonal else (0,):
        sizes = {"hourly": HOURS, "annual": annual_terms, "filled": HOURS, "slope": len(lead_times_hours)}
        arrays = {name: np.zeros((len(targets), size, *mask.shape)) for name, size in sizes.items()}
        arrays["squares"] = np.zeros((len(targets), 2))
        kinds.append(DampedPersistence.from_arrays({**arrays, "lead_times_hours": np.array(lead_times_hours)}))
    for t, name in enumerate(targets):
        if only is None or name in only:
            fitted = fit_climatologies(source, name, training_times, mask, seasonal, on_progress)
            slopes = _fit_slopes(source, name, fitted, lead_times_hours, training_starts, mask, on_progress)
            for kind, climatology, (slope, squares) in zip(kinds, fitted, slopes, strict=True):
                kind.climatology.hourly[t], kind.climatology.annual[t] = climatology.hourly[0], climatology.annual[0]
                kind.climatology.filled[t], kind.slope[t], kind.squares[t] = climatology.filled[0], slope, squares
    return kinds


def _fit_slopes(
    source: Fields,
    name: str,
    climatologies: Sequence[Climatology],
    lead_times_hours: Sequence[int],
    starts: np.ndarray,
    mask: np.ndarray,
    on_progress: Callable[[], None],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return for each climatology of a target the slopes [leads, H, W], and `DampedPersistence.squares` [2]."""
    steps = [lead // source.step_hours for lead in lead_times_hours]
    mask = mask & (climatologies[0].filled == 0).any(axis=(0, 1))  # the others have no anomalies
    sums = [_SlopeSums(len(steps), int(mask.sum())) for _ in climatologies]
    for block in contiguous_blocks(starts, BLOCK_HOURS):
        on_progress()
        window = np.arange(block[0], block[-1] + max(steps) + 1)
        values = source.read(name, window)[:, mask].astype(np.float64)
        for climatology, found in zip(climatologies, sums, strict=True):
            usual = np.stack([climatology.at(time)[0][mask] for time in source.times[window]])
            found.add(values, usual, len(block), steps)
    return [(found.slopes(mask, len(starts)), found.all_squares) for found in sums]


class _SlopeSums:
    """Sums over the training starts for each lead and cell."""

    def __init__(self, leads: int, cells: int):
        self.products, self.squares = np.zeros((2, leads, cells))
        self.largest, self.all_squares = np.zeros(cells), np.zeros(2)

    def add(self, values: np.ndarray, usual: np.ndarray, count: int, steps: Sequence[int]) -> None:
        """Add `count` consecutive starts: the first of `values` and `usual` [n, cells]; steps: to the leads."""
        exists = np.isfinite(values)
        anomaly = np.where(exists, values - usual, 0.0)
        self.largest = np.maximum(self.largest, np.where(exists, np.abs(values), 0.0).max(axis=0))
        self.all_squares += np.square(anomaly[:count]).sum(), exists[:count].sum()
        for k, step in enumerate(steps):
            at_start = np.where(exists[step : step + count], anomaly[:count], 0.0)
            self.products[k] += np.einsum("tc,tc->c", at_start, anomaly[step : step + count])
            self.squares[k] += np.einsum("tc,tc->c", at_start, at_start)

    def slopes(self, mask: np.ndarray, starts: int) -> np.ndarray:
        """Return the slopes [leads, H, W]."""
        slope = np.zeros((len(self.products), *mask.shape))
        usable = self.squares > DEGENERATE * starts * self.largest**2
        slope[:, mask] = np.divide(self.products, self.squares, out=np.zeros_like(self.products), where=usable)
        return slope
