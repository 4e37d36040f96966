"""How far off a forecast may be: the distribution of its errors, measured on the validation split.

Split-conformal prediction (Vovk et al. 2005; Romano et al. 2019, arXiv 1905.03222): an interval that held 80 % of the
errors on data that were not trained on holds about as many on new data of the same kind. There is one distribution for
each target, lead time and fifth of the forecast values, as errors grow with what is forecast.
"""

from dataclasses import dataclass

import numpy as np

GROUPS = 5
"""Groups of forecast values with equal numbers of errors."""
LOWER, UPPER = 0.1, 0.9
"""Levels of the quantiles between which 80 % of the observations are expected."""
LARGEST, ERROR_BINS = 10.0, 4000
"""Errors are counted in bins from -LARGEST to LARGEST standard deviations of the target; beyond, in the last ones."""
LEAST_FORECAST, LARGEST_FORECAST, FORECAST_BINS = -4.0, 8.0, 96
"""Forecasts likewise, as differences from the target's mean."""


class ErrorCounts:
    """Numbers of errors by target, lead time, forecast and error; exact, so they add up over ranks in any order.

    mean, std: of each target, [T], in the units of the data; they define the bins.

    Attributes:
        counts: int64 [T, leads, FORECAST_BINS, ERROR_BINS].
    """

    def __init__(self, mean: np.ndarray, std: np.ndarray, leads: int):
        self.mean, self.std = mean[:, None, None], std[:, None, None]
        self.counts = np.zeros((len(mean), leads, FORECAST_BINS, ERROR_BINS), np.int64)

    def add(self, leads: np.ndarray, forecast: np.ndarray, observed: np.ndarray, valid: np.ndarray) -> None:
        """Add a batch.

        Args:
            leads: indices of the lead times, [B].
            forecast, observed: [B, T, H, W], in the units of the data.
            valid: bool [B, T, H, W], which observations count.
        """
        t, k = np.arange(forecast.shape[1])[:, None, None], leads[:, None, None, None]
        places = np.broadcast_arrays(t, k, *self.bins(forecast, observed))
        flat = np.ravel_multi_index(tuple(place[valid] for place in places), self.counts.shape)
        np.add.at(self.counts.reshape(-1), flat, 1)  # several times as fast as with four indices

    def bins(self, forecast: np.ndarray, observed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the bins of forecasts and of their errors, int64 [B, T, H, W]; any where a value is not finite."""
        with np.errstate(invalid="ignore"):
            value = (forecast - self.mean) / self.std
            error = (observed - forecast) / self.std
        width = (LARGEST_FORECAST - LEAST_FORECAST) / FORECAST_BINS
        return (
            np.clip(np.nan_to_num((value - LEAST_FORECAST) / width), 0, FORECAST_BINS - 1).astype(np.int64),
            np.clip(np.nan_to_num((error + LARGEST) / (2 * LARGEST) * ERROR_BINS), 0, ERROR_BINS - 1).astype(np.int64),
        )


@dataclass(frozen=True)
class Spread:
    """The distributions of errors, and what they say of a forecast.

    Attributes:
        groups: int64 [T, leads, FORECAST_BINS], the group of each bin of forecasts.
        inside: bool [T, leads, GROUPS, ERROR_BINS], errors between the quantiles LOWER and UPPER.
        crps: float64 of the same shape, the continuous ranked probability score of an error in the bin, in the units of
            the data.
    """

    counts: ErrorCounts
    groups: np.ndarray
    inside: np.ndarray
    crps: np.ndarray

    @classmethod
    def measured(cls, counts: ErrorCounts) -> "Spread | None":
        """Return the spread of errors that were counted; None if a target has none at a lead time."""
        by_forecast = counts.counts.sum(axis=-1)
        total = by_forecast.sum(axis=-1, keepdims=True)
        if (total == 0).any():
            return None
        before = np.cumsum(by_forecast, axis=-1) - by_forecast  # smaller forecasts
        groups = ((2 * before + by_forecast) * GROUPS // (2 * total)).clip(0, GROUPS - 1)
        is_in_group = groups[..., None, :] == np.arange(GROUPS)[:, None]
        share = is_in_group.astype(np.float64) @ counts.counts.astype(np.float64)  # exact below 2^53
        empty = share.sum(axis=-1, keepdims=True) == 0
        share = np.where(empty, counts.counts.sum(axis=2, keepdims=True), share)
        share /= share.sum(axis=-1, keepdims=True)
        below = np.cumsum(share, axis=-1)
        middle = below - share / 2
        width = 2 * LARGEST / ERROR_BINS * counts.std[..., None]
        return cls(counts, groups, (middle >= LOWER) & (middle <= UPPER), _crps(share, below) * width)

    def judge(self, leads: np.ndarray, forecast: np.ndarray, observed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where 80 % intervals hold the observation, and the CRPS; arguments as for `ErrorCounts.add`."""
        of_forecast, of_error = self.counts.bins(forecast, observed)
        t, k = np.arange(forecast.shape[1])[:, None, None], leads[:, None, None, None]
        place = t, k, self.groups[t, k, of_forecast], of_error
        return self.inside[place], self.crps[place]


def _crps(share: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return E|X - y| - E|X - X'| / 2 for y in each bin, in bins, where X and X' are in bin b with the chance share[b].

    share, below: [..., bins], and its sums up to and with each bin.
    """
    bins = np.arange(share.shape[-1], dtype=np.float64)
    moment = np.cumsum(share * bins, axis=-1)
    distance = bins * (2 * below - 1) + moment[..., -1:] - 2 * moment
    return distance - (share * distance).sum(axis=-1, keepdims=True) / 2
