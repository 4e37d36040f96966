"""The forecast that an evaluation selects for a plot."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ForecastCase:
    """One forecast of one target and the observed field, [H, W] each, rows in any order.

    Attributes:
        lat2d, lon2d: coordinates in degrees.
        elevation_m: terrain height in metres, or None.
        truth, forecast: in display units, NaN where missing.
        wind_ms: [2, H, W] wind at the start in m/s, or None.
        name, unit: of the target, for display.
        start: time at which the forecast starts, datetime64.
    """

    lat2d: np.ndarray
    lon2d: np.ndarray
    elevation_m: np.ndarray | None
    truth: np.ndarray
    forecast: np.ndarray
    wind_ms: np.ndarray | None
    name: str
    unit: str
    start: np.datetime64
    lead_hours: int
