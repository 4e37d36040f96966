"""The present anomalies of the targets: what a forecast that starts from them needs, and an input of the network."""

from collections.abc import Sequence

import numpy as np

from topoflow.data.normalization import Base
from topoflow.data.prepared.reader import PreparedData

RECENT_HOURS = 12
"""A missing present value is replaced by the mean anomaly of so many hours before it."""


class PresentAnomalies:
    """Reads the differences of the targets from what is usual."""

    def __init__(self, data: PreparedData, targets: Sequence[str], base: Base):
        self._data, self._base, self._targets = data, base, tuple(targets)
        # in the order in which they lie, so that the data may give a view of them
        self._names = tuple(name for name in data.dynamic if name in targets)
        self._order = [self._names.index(name) for name in targets]

    def at(self, start: int) -> np.ndarray:
        """Return the anomalies [T, H, W] at position `start` of the data's times, in the units of the data, float32.

        A missing value is replaced by the mean over the last RECENT_HOURS hours, or by 0 if those have no value.
        """
        anomaly = self._base.usual(self._data.times[start])
        fields = self._data.at(self._names, start)
        for usual, field in zip(anomaly, self._order, strict=True):
            np.subtract(fields[field], usual, out=usual)
        missing = np.flatnonzero(np.isnan(anomaly))
        if len(missing):
            anomaly.reshape(-1)[missing] = self._recent_mean(start, missing)
        return anomaly

    def _recent_mean(self, start: int, places: np.ndarray) -> np.ndarray:
        """Return the mean anomalies [len(places)] of the hours before `start`; places: in the T * H * W values."""
        times, earliest = self._data.times, max(0, start - RECENT_HOURS)
        since = times[start] - np.timedelta64(RECENT_HOURS, "h")
        recent = range(earliest + int(np.searchsorted(times[earliest:start], since)), start)
        values = self._data.at_places(self._targets, recent, places)
        values -= self._base.usual_at_places(times[recent.start : start], places)
        exists = ~np.isnan(values)
        return np.where(exists, values, 0).sum(axis=0) / np.maximum(exists.sum(axis=0, dtype=np.float32), 1)
