"""Baseline forecasts without a network, fitted on the training split.

persistence                  the present value
climatology                  the training mean of the cell by hour of day
damped persistence           climatology plus the damped present anomaly
seasonal damped persistence  the same with the seasonal climatology, if the training split covers the year
"""

from dataclasses import dataclass

import numpy as np

from topoflow.physics.persistence import DampedPersistence


@dataclass(frozen=True)
class Baselines:
    """Fitted baselines, in the units of the data, float64.

    seasonal: None if the training split does not cover the year.
    """

    hourly: DampedPersistence
    seasonal: DampedPersistence | None

    def forecast(
        self, present: np.ndarray, start: np.datetime64, target: np.datetime64, lead: int
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Return the forecast of each baseline, and where the climatology is not the cell's own.

        Args:
            present: [targets, H, W] values at the start, NaN where missing.
            start, target: the times from which and for which the forecast is made.
            lead: index of the lead time.

        Returns:
            {name: [targets, H, W]}, NaN where missing, and bool of the same shape.
        """
        forecasts = {"persistence": present, "climatology": self.hourly.climatology.at(target)}
        kinds = {"damped_persistence": self.hourly, "seasonal_damped_persistence": self.seasonal}
        for name, damped in kinds.items():
            if damped is not None:
                forecasts[name] = damped.forecast(present - damped.climatology.at(start), target, lead)
        return forecasts, self.hourly.climatology.filled_at(target)
