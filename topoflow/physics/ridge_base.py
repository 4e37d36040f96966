"""Ridge regression as the base of a network: its forecasts of all starts of a split are made before training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from topoflow.physics.persistence import DampedPersistence
from topoflow.physics.ridge import Ridge
from topoflow.physics.ridge_features import GriddedFields, RidgeFeatures


class RidgeForecasts:
    """The forecasts of a ridge from given starts, of which the anomalies of the known cells are held."""

    def __init__(
        self,
        source: GriddedFields,
        targets: Sequence[str],
        persistence: DampedPersistence,
        ridge: Ridge,
        starts: np.ndarray,
        in_training: bool = False,
        on_progress: Callable[[], None] = lambda: None,
    ):
        self._times, self._starts, self._persistence = source.times, starts, persistence
        self._cells = np.flatnonzero(ridge.cells)
        features = RidgeFeatures(source, targets, persistence, ridge.known)
        self._anomalies = ridge.forecast_anomalies(features, starts, in_training, on_progress)

    def forecast(self, start: int, lead: int, anomaly: np.ndarray | None = None) -> np.ndarray:
        """Return the forecast [T, H, W] from position `start`, one of the starts, for the lead with index `lead`."""
        hours = np.timedelta64(int(self._persistence.lead_times_hours[lead]), "h")
        forecast = self._persistence.climatology.at(self._times[start] + hours)
        anomalies = self._anomalies[np.searchsorted(self._starts, start), lead]
        scale = self._persistence.deviation[:, None].astype(forecast.dtype)
        forecast.reshape(len(forecast), -1)[:, self._cells] += scale * anomalies
        return forecast


@dataclass(frozen=True)
class RidgeBase:
    """A ridge regression about the climatology of `persistence`; see `topoflow.data.normalization.Base`."""

    persistence: DampedPersistence
    ridge: Ridge

    @property
    def lead_times_hours(self) -> np.ndarray:
        return self.persistence.lead_times_hours

    @property
    def deviation(self) -> np.ndarray:
        return self.persistence.deviation

    @property
    def known(self) -> np.ndarray:
        return self.persistence.known

    def usual(self, time: np.datetime64) -> np.ndarray:
        return self.persistence.usual(time)

    def usual_at_places(self, times: np.ndarray, places: np.ndarray) -> np.ndarray:
        return self.persistence.usual_at_places(times, places)

    def forecasts_from(
        self,
        source: GriddedFields,
        targets: Sequence[str],
        starts: np.ndarray,
        in_training: bool,
        on_progress: Callable[[], None],
    ) -> RidgeForecasts:
        """Make the forecasts; each of a training start by the fit that left its block of time out."""
        return RidgeForecasts(source, targets, self.persistence, self.ridge, starts, in_training, on_progress)

    def arrays(self) -> dict[str, np.ndarray]:
        ridge = {f"ridge_{name}": array for name, array in self.ridge.arrays().items()}
        return {**self.persistence.arrays(), **ridge}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "RidgeBase":
        """Return what has the `arrays`."""
        ridge = {name.removeprefix("ridge_"): array for name, array in arrays.items() if name.startswith("ridge_")}
        return cls(DampedPersistence.from_arrays(arrays), Ridge(**ridge))
