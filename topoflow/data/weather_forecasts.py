"""Weather after the start, of the latest forecast that was there at the start: `data.forecast`."""

import difflib
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence

import numpy as np

from topoflow.data.channels import Channel
from topoflow.data.contents import DIGITS
from topoflow.data.moments import day_pieces
from topoflow.data.prepared.reader import PreparedData
from topoflow.errors import DataError

OLDEST_HOURS = 24
"""For so long is a forecast used after it is there."""
_AHEAD = re.compile(r"(?P<variable>.+)\+(?P<hours>\d+)h")
_HOUR = np.timedelta64(1, "h")


class WeatherForecasts:
    """Reads forecasts from prepared data whose times are when they were issued.

    A variable `u+12h` of these data is u 12 hours after the issue, `u` u at the issue.

    Args:
        issued: the forecasts.
        data: what the starts are positions of.
        hours: {variable: hours after the start, > 0} that are read.
        delay_hours: how long after its issue a forecast is there.

    Raises:
        DataError: the forecasts are of another place, or lack a variable or hours.
    """

    def __init__(self, issued: PreparedData, data: PreparedData, hours: Mapping[str, Sequence[int]], delay_hours: int):
        self.issued, self._delay = issued, delay_hours
        self._times, self._step_hours = data.times, data.step_hours
        self._hours = sorted({hour for of_variable in hours.values() for hour in of_variable})
        if not issued.grid.is_at(data.grid):
            raise DataError(
                f"data.forecast: {issued.folder} is elsewhere: {issued.grid.describe()}: expected the cells of "
                f"{data.folder}: {data.grid.describe()} (prepare it with grid: {{like: {data.folder}}})"
            )
        self._steps = {name: _steps_of(name, issued) for name in hours}
        for name, steps in self._steps.items():
            unit = issued.units[Channel(name, int(steps[0])).name]
            if unit != data.units[name]:
                raise DataError(
                    f"data.forecast: {issued.folder} has {name} in {unit}: expected {data.units[name]} as in "
                    f"{data.folder}"
                )
            first, last = min(hours[name]) + delay_hours, max(hours[name]) + delay_hours
            if steps[0] > first or steps[-1] < last:
                raise DataError(
                    f"data.forecast: {issued.folder} has {name} from {steps[0]} to {steps[-1]} h after the issue: "
                    f"expected {first} to {last}, for data.hours and data.forecast_delay_hours (`steps` of its recipe)"
                )
        there = issued.times + delay_hours * _HOUR
        self._issue = np.searchsorted(there, self._times, side="right") - 1
        """Of each time of the data, the position of the latest issue that was there; -1 for none."""

    def cover(self, starts: np.ndarray) -> np.ndarray:
        """Return for positions in the data's times [n] whether a forecast reaches all hours from there, bool [n]."""
        issue = self._issue[starts]
        age = (self._times[starts] - self.issued.times[issue]) // _HOUR
        first = max(int(steps[0]) for steps in self._steps.values())
        last = min(int(steps[-1]) for steps in self._steps.values())
        reached = (age + self._hours[0] >= first) & (age + self._hours[-1] <= last)
        return (issue >= 0) & (age <= self._delay + OLDEST_HOURS) & reached

    def at(self, names: tuple[str, ...], start: int, position: int) -> np.ndarray:
        """Return `names` as forecast for a start at `position` in the data's times: float32 [len(names), H, W].

        NaN where a value is missing; it may be a view, as of `PreparedData.at`.
        """
        issue = int(self._issue[start])
        age = int((self._times[start] - self.issued.times[issue]) // _HOUR)
        ahead = age + (position - start) * self._step_hours
        steps = [self._steps[name] for name in names]
        if all(np.array_equal(of_name, steps[0]) for of_name in steps[1:]):
            return self._between(names, steps[0], issue, ahead)
        pairs = zip(names, steps, strict=True)
        return np.concatenate([self._between((name,), of_name, issue, ahead) for name, of_name in pairs])

    def _between(self, names: tuple[str, ...], steps: np.ndarray, issue: int, ahead: int) -> np.ndarray:
        after = int(np.searchsorted(steps, ahead))
        later = self._at_step(names, steps[after], issue)
        if steps[after] == ahead:
            return later
        earlier = self._at_step(names, steps[after - 1], issue)
        weight = np.float32((ahead - steps[after - 1]) / (steps[after] - steps[after - 1]))
        return earlier + weight * (later - earlier)

    def _at_step(self, names: tuple[str, ...], step: int, issue: int) -> np.ndarray:
        return self.issued.at(tuple(Channel(name, int(step)).name for name in names), issue)

    def contents(self, pieces: list[np.ndarray]) -> dict[str, str]:
        """Return {`forecasts of u`: hashes of what starts of each day can read}, see `Contents.hashes`.

        pieces: positions in the data's times, those of each day.
        """
        every = day_pieces(self.issued.times, np.arange(len(self.issued.times)))
        of_day = {str(self.issued.times[piece[0]])[:10]: piece for piece in every}
        days = [self._times[piece[0]].astype("datetime64[D]") for piece in pieces]
        oldest = -(-(self._delay + OLDEST_HOURS) // 24)
        hashes = {}
        for name, steps in self._steps.items():
            columns = [Channel(name, int(step)).name for step in steps]
            text = " ".join(self.issued.encoding(column) for column in columns)
            found = []
            for day in days:
                read = [piece for back in range(oldest + 1) if (piece := of_day.get(str(day - back))) is not None]
                issued = [str(time) for piece in read for time in self.issued.times[piece]]
                parts = [self.issued.hash_of_day(column, piece) for piece, column in itertools.product(read, columns)]
                found.append(hashlib.sha256(" ".join([text, *issued, *parts]).encode()).hexdigest()[:DIGITS])
            hashes[f"forecasts of {name}"] = "".join(found)
        return hashes


def _steps_of(variable: str, issued: PreparedData) -> np.ndarray:
    """Return the hours after the issue for which there is a forecast of `variable`, increasing."""
    found: dict[str, list[int]] = {}
    for name in issued.dynamic:
        match = _AHEAD.fullmatch(name)
        found.setdefault(match["variable"] if match else name, []).append(int(match["hours"]) if match else 0)
    if variable not in found:
        near = difflib.get_close_matches(variable, found, n=1, cutoff=0.6)
        hint = f" (nearest: {near[0]})" if near else ""
        raise DataError(
            f"data.forecast: {issued.folder} has no forecasts of {variable!r}{hint}: it has {', '.join(found)}"
        )
    return np.array(sorted(found[variable]))
