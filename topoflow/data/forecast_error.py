"""Weather after the start with the errors of a forecast: mixed with that of another time of the same season."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from topoflow.data.prepared.reader import PreparedData
from topoflow.errors import ConfigError, DataError

SEASON_DAYS, APART_DAYS = 30, 5
"""The other time is at most so far in the season, of any year, and at least so far in time."""
_DAY, _YEAR = 24, 365.25 * 24
_OTHER_TIME = 2
"""Purpose of the draw in the seed sequence."""


@dataclass(frozen=True)
class ForecastSkill:
    """Correlation of forecast with true anomalies by hours ahead: linear between `hours`, constant outside."""

    hours: tuple[float, ...]
    correlations: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> "ForecastSkill":
        """Parse `0:1,24:0.95,96:0.65`, hours ahead and correlations; ConfigError for anything else."""
        try:
            hours, correlations = zip(*(map(float, pair.split(":")) for pair in text.split(",")), strict=True)
        except ValueError:
            hours, correlations = (), ()
        ascending = all(a < b for a, b in itertools.pairwise((*hours, np.inf)))
        in_range = all(0 <= correlation <= 1 for correlation in correlations)
        if not (hours and hours[0] >= 0 and ascending and in_range):
            raise ConfigError(
                f"--forecast-error: {text!r} is not usable: expected HOURS:CORRELATION,... such as 0:1,24:0.95,96:0.7; "
                "hours >= 0 ascending, correlations from 0 to 1"
            )
        return cls(hours, correlations)

    def at(self, hours: float) -> float:
        """Return the correlation so many hours ahead."""
        return float(np.interp(hours, self.hours, self.correlations))

    def describe(self, hours: Sequence[int]) -> str:
        """Its correlations at some hours, for the log."""
        return ", ".join(f"{self.at(ahead):.3g} at {ahead} h" for ahead in sorted(set(hours)))


class WeatherErrors:
    """Reads weather after a start as a forecast from the start might have had it.

    A value becomes usual + r x anomaly + sqrt(1 - r^2) x anomaly of the other time, where r is the skill's correlation
    and the other time is a draw keyed by (seed, start). It is shifted by the same time for all variables, cells and
    hours of a start, by whole days, so that errors are as coherent as weather is.

    Args:
        data: what to read.
        names: of the variables that are read after the start.
        usual: returns their values [len(names), H, W] about which there are anomalies at a time.
        hours: at which they are read, relative to the start; the other time has them all.
        skill: the correlations.
        seed: of the draws.
    """

    def __init__(
        self,
        data: PreparedData,
        names: Sequence[str],
        usual: Callable[[np.datetime64], np.ndarray],
        hours: Sequence[int],
        skill: ForecastSkill,
        seed: int,
    ):
        self.hours, self.skill = tuple(hours), skill
        self._data, self._names, self._usual, self._seed = data, tuple(names), usual, seed
        self._times = data.times.astype("datetime64[h]").astype(np.int64)
        last = max(hours) // data.step_hours
        self._complete = np.zeros(len(self._times), bool)  # positions from which no hour is missing
        self._complete[:-last] = self._times[last:] - self._times[:-last] == max(hours)
        self._others: dict[int, int] = {}

    def at(self, names: tuple[str, ...], start: int, position: int) -> np.ndarray:
        """Return `names` at `position` of the data's times as forecast from `start`: float32 [len(names), H, W].

        NaN where the value of either time is missing; without any error it may be a view, as of `PreparedData.at`.
        """
        truth, r = self._data.at(names, position), self.skill.at(int(self._times[position] - self._times[start]))
        if r == 1:
            return truth
        other = position + self.other_time(start) - start
        chosen = [self._names.index(name) for name in names]
        usual, usual_of_other = (self._usual(self._data.times[at])[chosen] for at in (position, other))
        anomaly, error = truth - usual, self._data.at(names, other) - usual_of_other
        return (usual + r * anomaly + (1 - r**2) ** 0.5 * error).astype(np.float32, copy=False)

    def other_time(self, start: int) -> int:
        """Return the position in the data's times that takes the place of `start`: uniform over all that may.

        Raises:
            DataError: there is none.
        """
        if start not in self._others:
            shift = self._times - self._times[start]
            in_season = np.abs((shift + _YEAR / 2) % _YEAR - _YEAR / 2) <= SEASON_DAYS * _DAY
            usable = self._complete & in_season & (shift % _DAY == 0) & (np.abs(shift) >= APART_DAYS * _DAY)
            candidates = np.flatnonzero(usable)
            if len(candidates) == 0:
                raise DataError(
                    f"--forecast-error: no other time for {self._data.times[start]}: expected data at the same hour of "
                    f"a day at least {APART_DAYS} days away and within {SEASON_DAYS} days of the season"
                )
            sequence = np.random.SeedSequence(self._seed, spawn_key=(_OTHER_TIME, int(self._times[start])))
            self._others[start] = int(candidates[int(np.random.Philox(sequence).random_raw()) % len(candidates)])
        return self._others[start]
