"""The network's inputs at the start of a forecast. No target is needed, and nothing after the last input's hour."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from topoflow.data.advected import AdvectedChannels
from topoflow.data.channels import Channel
from topoflow.data.normalization import Normalization
from topoflow.data.prepared.reader import PreparedData, serial_pieces

_HOUR = np.timedelta64(1, "h")
_PIECE_BYTES = 256 * 2**10
"""Amount normalized at once, so that the second pass finds it in the processor's cache."""

Runs = list[tuple[slice, slice]]
"""Consecutive rows of a sample, and the consecutive fields that they are made of."""


class WeatherAhead(Protocol):
    """Weather after a start that is not what the data have."""

    def at(self, names: tuple[str, ...], start: int, position: int) -> np.ndarray:
        """Return `names` at `position` of the data's times as known at `start`: float32 [len(names), H, W]."""
        ...


class InputReader:
    """Reads input channels, and the wind.

    Args:
        data: what to read.
        normalization: of the variables of all channels.
        channels: in the order of the network.
        with_wind: whether to read the wind of the whole field in m/s.
        as_anomalies: targets whose channels are anomalies over their deviation, by the base of the normalization.
        ahead: the weather after the start; None: it is as the data have it.

    Attributes:
        shape: of the inputs of one start, (V, H, W).
        wind_shape: (2 or 0, H, W).
    """

    def __init__(
        self,
        data: PreparedData,
        normalization: Normalization,
        channels: Sequence[Channel],
        with_wind: bool,
        as_anomalies: Sequence[str] = (),
        ahead: WeatherAhead | None = None,
    ):
        self._data, self._normalization, self._ahead = data, normalization, ahead
        self.shape = (len(channels), *data.grid.shape)
        self.wind_shape = (2 if with_wind else 0, *data.grid.shape)
        names = tuple(channel.variable for channel in channels)
        self._mean, self._std = normalization.constants(names)
        carried = [row for row, channel in enumerate(channels) if channel.advected]
        self._advected = AdvectedChannels(data, normalization, channels, as_anomalies) if carried else None
        dynamic = [row for row, name in enumerate(names) if name in data.dynamic and row not in carried]
        self._n_dynamic = len(dynamic)
        self._available = names.index("available") if "available" in names else None
        self._clock = [(row, name) for row, name in enumerate(names) if name.startswith(("hour_", "day_"))]
        self._static = [row for row, name in enumerate(names) if name in data.static_fields and row not in carried]
        # anomalies are written in a way of their own; `available` counts their gaps with those of the others
        plain = [row for row in dynamic if self._available is not None or names[row] not in as_anomalies]
        self._base = normalization.base if as_anomalies else None
        self._deviation = self._base.deviation.astype(np.float32) if self._base is not None else np.empty(0, np.float32)
        # by hour: rows of a sample, the variables in them, and their places among the targets
        self._anomalies: dict[int, tuple[list[int], tuple[str, ...], list[int]]] = {}
        for row, channel in enumerate(channels):
            if channel.variable in as_anomalies and row not in carried:
                rows, held, places = self._anomalies.get(channel.hours, ([], (), []))
                place = list(as_anomalies).index(channel.variable)
                self._anomalies[channel.hours] = [*rows, row], (*held, channel.variable), [*places, place]
        self._template = np.zeros(self.shape, np.float32)
        for row in self._static:
            self._template[row] = np.nan_to_num(normalization.normalize(names[row], data.static(names[row])))
        # by hour: what is read, in the order in which it lies, so that it may be a view, and where it goes
        self._reads: list[tuple[int, tuple[str, ...], Runs]] = []
        self._wind: list[int] = []
        for hours in sorted({channels[row].hours for row in plain} | ({0} if with_wind else set())):
            wanted = {names[row] for row in plain if channels[row].hours == hours}
            wind = ("u", "v") if with_wind and hours == 0 else ()
            read = tuple(name for name in data.dynamic if name in wanted or name in wind)
            fields = {row: read.index(names[row]) for row in plain if channels[row].hours == hours}
            self._reads.append((hours // data.step_hours, read, runs(fields, data.grid.lat2d.size)))
            if wind:
                self._wind = [read.index(name) for name in wind]

    def fill(self, start: int, x: np.ndarray, wind: np.ndarray, anomaly: np.ndarray | None = None) -> None:
        """Write the inputs of a forecast from position `start` of the data's times.

        Args:
            x: float32 [V, H, W], normalized; 0 (the mean) where missing.
            wind: float32 [2 or 0, H, W], m/s; a missing value is the mean of those present (0 without any).
            anomaly: [T, H, W], that of the targets at the start (see `PresentAnomalies`), if channels are anomalies.
        """
        for row in self._static:
            x[row] = self._template[row]
        absent: np.ndarray | int = 0
        path_hours = () if self._advected is None else self._advected.wind_hours
        path_wind = np.empty((len(path_hours), 2, *x.shape[1:]), np.float32)
        for steps, names, rows_of_fields in self._reads:
            if self._ahead is not None and steps > 0:
                fields = self._ahead.at(names, start, start + steps)
            else:
                fields = self._data.at(names, start + steps)
            for rows, of_fields in rows_of_fields:
                values = x[rows]
                np.subtract(fields[of_fields], self._mean[rows], out=values)
                np.divide(values, self._std[rows], out=values)
                if self._available is not None:
                    absent = absent + np.isnan(values).sum(axis=0, dtype=np.float32)
                zero_nan(values)
            if steps == 0:
                for component, field in zip(wind, self._wind, strict=False):
                    _fill_wind(fields[field], component)
            if steps * self._data.step_hours in path_hours:
                path = path_wind[path_hours.index(steps * self._data.step_hours)]
                _fill_wind(fields[names.index("u")], path[0])
                _fill_wind(fields[names.index("v")], path[1])
        if self._advected is not None:
            carried = x[self._advected.rows]
            self._advected.fill(start, path_wind, anomaly, carried)
            zero_nan(carried)
        for hours in self._anomalies:
            self._fill_anomalies(start, hours, x, anomaly)
        if self._available is not None:
            x[self._available] = 1 - absent / np.float32(self._n_dynamic)
        for row, name in self._clock:
            x[row] = _clock_value(name, self._data.times[start])

    def _fill_anomalies(self, start: int, hours: int, x: np.ndarray, present: np.ndarray | None) -> None:
        assert self._base is not None
        assert present is not None
        rows, names, places = self._anomalies[hours]
        position = start + hours // self._data.step_hours
        usual = self._base.usual(self._data.times[position]) if hours else None
        for row, name, place in zip(rows, names, places, strict=True):
            if usual is None:
                np.divide(present[place], self._deviation[place], out=x[row])
            else:
                np.subtract(self._data.at((name,), position)[0], usual[place], out=x[row])
                x[row] /= self._deviation[place]
                zero_nan(x[row])


def runs(fields: dict[int, int], cells: int) -> Runs:
    """Return rows and the `fields` {row: field} that they are, in runs of at most _PIECE_BYTES (or one field)."""
    most = max(1, _PIECE_BYTES // (4 * cells))
    found: Runs = []
    for row, field in fields.items():
        if found and (found[-1][0].stop, found[-1][1].stop) == (row, field) and field - found[-1][1].start < most:
            found[-1] = slice(found[-1][0].start, row + 1), slice(found[-1][1].start, field + 1)
        else:
            found.append((slice(row, row + 1), slice(field, field + 1)))
    return found


def zero_nan(values: np.ndarray) -> None:
    """Replace NaN by 0 in one pass; numpy takes two, and is many times slower if there are any."""
    for piece in serial_pieces(values):
        torch.nan_to_num_(piece, nan=0.0, posinf=np.inf, neginf=-np.inf)


def _fill_wind(field: np.ndarray, component: np.ndarray) -> None:
    component[:] = field
    missing = np.isnan(component)
    if missing.any():
        component[missing] = component[~missing].mean(dtype=np.float64) if not missing.all() else 0


def _clock_value(name: str, time: np.datetime64) -> float:
    """hour_sin, hour_cos, day_sin or day_cos at `time`; days count from 1 to 366 and turn once in 365.25."""
    day, year = time.astype("datetime64[D]"), time.astype("datetime64[Y]").astype("datetime64[D]")
    hour_of_day, day_of_year = int((time - day) / _HOUR), (day - year).astype(int) + 1
    turn = hour_of_day / 24 if name.startswith("hour_") else day_of_year / 365.25
    return float((np.sin if name.endswith("_sin") else np.cos)(2 * np.pi * turn))
