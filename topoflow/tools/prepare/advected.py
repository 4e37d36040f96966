"""Variables that the wind carries, as `data.advect` takes them: see `topoflow.physics.advection`."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from topoflow.data.channels import Channel
from topoflow.errors import ConfigError
from topoflow.physics.advection import IndexSpace, interpolate, trace_back
from topoflow.tools.prepare.recipe import Advect
from topoflow.tools.prepare.statics import static_units
from topoflow.tools.prepare.writing import Fields


class WithAdvected:
    """Fields, and after them those of the recipe's `advect`: each tracer at each lead; see `writing.Fields`.

    The wind is that of each time from the start to the longest lead. Where one of these times is not in the data, as at
    their end, the variables are missing.

    Raises:
        ConfigError: a tracer is not in the data, there is no wind, or leads do not fit the step of the data.
    """

    def __init__(self, source: Fields, statics: Mapping[str, np.ndarray], advect: Advect):
        self._source, self._leads = source, advect.leads
        self.times, self.step_hours, self.shape = source.times, source.step_hours, source.shape
        self._space = IndexSpace(statics["lat2d"], statics["lon2d"])
        self._names = tuple(source.units)
        known = {*source.units, *(name for name in statics if name != "mask")}
        missing = sorted({"u", "v"} - {*source.units} | {*advect.tracers} - known)
        if missing:
            raise ConfigError(f"advect: {', '.join(missing)}: not in the data, which have {', '.join(sorted(known))}")
        fits = all(lead > 0 and lead % self.step_hours == 0 for lead in advect.leads)
        if not (fits and advect.leads and list(advect.leads) == sorted(set(advect.leads))):
            raise ConfigError(
                f"advect: leads: {list(advect.leads)}: expected increasing multiples of {self.step_hours} hours"
            )
        carried = [name for name in advect.tracers if name in source.units]
        passed = [name for name in advect.tracers if name not in source.units]
        self._carried = [self._names.index(name) for name in carried]
        self._passed = np.array([statics[name] for name in passed], np.float32).reshape(-1, *self.shape)
        units = {name: source.units[name] for name in carried} | static_units({name: statics[name] for name in passed})
        further = {Channel(name, lead, advected=True).name: units[name] for name in units for lead in self._leads}
        self.units: Mapping[str, str] = {**source.units, **further}
        self._winds: dict[int, np.ndarray] = {}
        """By position: those that the next hours need too."""

    @property
    def is_decided(self) -> bool:
        """Whether everything read so far may be written."""
        return self._source.is_decided

    def fields(self, positions: np.ndarray) -> np.ndarray:
        """Return float32 [n, V, H, W] at increasing positions [n] of `times`."""
        return self._extended(positions, self._source.fields(positions))

    def days(self, pieces: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, int]]]:
        """Yield (positions, fields, values dropped by reason) of each day."""
        for piece, values, dropped in self._source.days(pieces):
            yield piece, self._extended(piece, values), dropped

    def file_states(self, first: int, stop: int) -> list[str]:
        """Return what changes with the files of the times [first, stop) and of the wind after them."""
        further = self._leads[-1] // self.step_hours
        return self._source.file_states(first, min(stop + further, len(self.times)))

    def seen(self) -> list[Any]:
        """See `writing.Fields`."""
        return self._source.seen()

    def recall(self, seen: list[Any]) -> None:
        """See `writing.Fields`."""
        self._source.recall(seen)

    def finish(self) -> None:
        """See `writing.Fields`."""
        self._source.finish()

    def _extended(self, positions: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Return `values` [n, V, H, W] at positions with the further variables."""
        out = np.full((len(values), len(self.units), *self.shape), np.nan, np.float32)
        out[:, : len(self._names)] = values
        hours = np.arange(0, self._leads[-1] + 1, self.step_hours)
        for row, position in enumerate(positions):
            window = np.arange(position, position + len(hours))
            if window[-1] >= len(self.times) or self.times[window[-1]] - self.times[position] != hours[-1]:
                continue
            wind = self._wind_at(window)
            origins, means = trace_back(self._space, self._leads, hours.tolist(), wind, self._passed)
            carried = interpolate(self._space, values[row, self._carried], origins)
            out[row, len(self._names) :] = np.concatenate([carried, means]).reshape(-1, *self.shape)
        return out

    def _wind_at(self, window: np.ndarray) -> np.ndarray:
        """Return u and v [n, 2, H, W] at positions; a missing value is the mean of those present, 0 without any."""
        near = range(window[0], window[-1] + 24)
        self._winds = {position: wind for position, wind in self._winds.items() if position in near}
        unread = np.array([position for position in window if position not in self._winds], np.int64)
        # a day at once, so that the chunks of files are not read again for each hour
        ahead = np.arange(unread[0], min(unread[-1] + 24, len(self.times))) if len(unread) else unread
        if len(ahead):
            winds = self._source.fields(ahead)[:, [self._names.index("u"), self._names.index("v")]]
            count = (~np.isnan(winds)).sum(axis=(2, 3), keepdims=True)
            mean = np.nansum(winds, axis=(2, 3), keepdims=True, dtype=np.float64) / np.maximum(count, 1)
            self._winds |= dict(zip(ahead.tolist(), np.where(np.isnan(winds), np.float32(mean), winds), strict=True))
        return np.stack([self._winds[position] for position in window])
