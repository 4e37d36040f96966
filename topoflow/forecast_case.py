"""One forecast that is drawn: what an evaluation chooses, and the plots show."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ForecastCase:
    """One forecast of one target beside what came true, [H, W] each, in display units, NaN where there is no value.

    lat2d, lon2d: degrees. elevation_m: metres, or None. wind_ms: [2, H, W] at the start, m/s, or None. start: hour,
    datetime64. Rows in any order.
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
