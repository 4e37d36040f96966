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
        self._data, self._base = data, base
        # in the order in which they lie, so that the data may give a view of them
        self._names = tuple(name for name in data.dynamic if name in targets)
        self._order = [self._names.index(name) for name in targets]
        self._cells = data.grid.lat2d.size

    def at(self, start: int) -> np.ndarray:
        """Return the anomalies [T, H, W] at position `start` of the data's times, in the units of the data, float32.

        A missing value is replaced by the mean over the last RECENT_HOURS hours, or by 0 if those have no value.
        """
        times = self._data.times
        present = self._data.at(self._names, start)[self._order]
        present -= self._base.usual(times[start])
        missing = np.flatnonzero(np.isnan(present))
        if len(missing):
            total, count = np.zeros((2, len(missing)), np.float32)
            stored = np.array(self._order)[missing // self._cells] * self._cells + missing % self._cells
            for position in self._recent(start):
                values = self._data.at(self._names, position).reshape(-1)[stored]
                anomaly = values - self._base.usual(times[position], missing)
                total += np.nan_to_num(anomaly)
                count += ~np.isnan(anomaly)
            present.reshape(-1)[missing] = total / np.maximum(count, 1)
        return present

    def _recent(self, start: int) -> range:
        times, first = self._data.times, start
        while first > 0 and times[start] - times[first - 1] <= np.timedelta64(RECENT_HOURS, "h"):
            first -= 1
        return range(first, start)
