"""Baseline forecasts without a network, fitted on the training split.

persistence                  the present value
climatology                  the training mean of the cell by hour of day
damped persistence           climatology plus the damped present anomaly
seasonal damped persistence  the same with the seasonal climatology, if the training split covers the year
ridge                        regression on present and past anomalies around the cell, for data that are not too large
"""

from dataclasses import dataclass

import numpy as np

from topoflow.physics.persistence import DampedPersistence
from topoflow.physics.ridge_base import RidgeForecasts


@dataclass(frozen=True)
class Baselines:
    """Fitted baselines, in the units of the data, float64.

    seasonal: None if the training split does not cover the year. ridge: None if it was not fitted.
    """

    hourly: DampedPersistence
    seasonal: DampedPersistence | None
    ridge: RidgeForecasts | None = None

    @property
    def damped(self) -> tuple[str, ...]:
        """Names of those that start from the present value."""
        found = {"damped_persistence": self.hourly, "seasonal_damped_persistence": self.seasonal, "ridge": self.ridge}
        return tuple(name for name, fitted in found.items() if fitted is not None)

    def forecast(
        self, present: np.ndarray, times: np.ndarray, start: int, target: int, lead: int
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Return the forecast of each baseline, and where the climatology is not the cell's own.

        Args:
            present: [targets, H, W] values at the start, NaN where missing.
            times: of the data.
            start, target: positions in `times` from which and for which the forecast is made.
            lead: index of the lead time.

        Returns:
            {name: [targets, H, W]}, NaN where missing, and bool of the same shape.
        """
        forecasts = {"persistence": present, "climatology": self.hourly.climatology.at(times[target])}
        kinds = {"damped_persistence": self.hourly, "seasonal_damped_persistence": self.seasonal}
        for name, damped in kinds.items():
            if damped is not None:
                forecasts[name] = damped.forecast(present - damped.usual(times[start]), times[target], lead)
        if self.ridge is not None:
            forecasts["ridge"] = self.ridge.forecast(start, lead)
        return forecasts, self.hourly.climatology.filled_at(times[target])
