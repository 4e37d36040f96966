"""Input channels that the wind carries: see `topoflow.physics.advection`."""

from collections.abc import Sequence

import numpy as np

from topoflow.data.channels import Channel, wind_hours
from topoflow.data.normalization import Normalization
from topoflow.data.prepared.reader import PreparedData
from topoflow.physics.advection import IndexSpace, interpolate, trace_back


class AdvectedChannels:
    """Makes the channels of data.advect: for each of its variables one for each lead time.

    A variable that changes in time is taken at the start, where the air comes from that arrives at the lead time. Of a
    field that does not change, it is the mean along the path of that air.

    Args:
        channels: all of the network.
        as_anomalies: targets that are carried as the present anomaly over its deviation.

    Attributes:
        wind_hours: hours after the start, increasing, of the wind that `fill` needs.
    """

    def __init__(
        self,
        data: PreparedData,
        normalization: Normalization,
        channels: Sequence[Channel],
        as_anomalies: Sequence[str],
    ):
        self._data, self._space = data, IndexSpace(data.grid.lat2d, data.grid.lon2d)
        self.wind_hours = wind_hours(channels)
        rows = {channel.name: row for row, channel in enumerate(channels) if channel.advected}
        advected = [channels[row] for row in rows.values()]
        self._leads = sorted({channel.hours for channel in advected})
        names = tuple(dict.fromkeys(channel.variable for channel in advected))
        self._carried = tuple(name for name in names if name in data.dynamic)
        passed = tuple(name for name in names if name not in data.dynamic)
        self._passed = np.array([data.static(name) for name in passed], np.float32).reshape(-1, *data.grid.shape)
        self._rows = [[rows[Channel(name, lead, True).name] for lead in self._leads] for name in self._carried + passed]
        self._mean, self._std = (values[:, None] for values in normalization.constants(self._carried + passed))
        self._anomalies = [place for place, name in enumerate(as_anomalies) if name in self._carried]
        self._places = [self._carried.index(as_anomalies[place]) for place in self._anomalies]
        if self._anomalies:
            assert normalization.base is not None
            self._mean[self._places] = 0
            self._std[self._places, 0] = normalization.base.deviation[self._anomalies, None, None]

    def fill(self, start: int, wind_ms: np.ndarray, anomaly: np.ndarray | None, x: np.ndarray) -> None:
        """Write the channels of a forecast from position `start` of the data's times.

        Args:
            wind_ms: u and v at wind_hours, float32 [n, 2, H, W], m/s, none missing.
            anomaly: [T, H, W], that of the targets at the start, if channels are anomalies.
            x: the inputs, float32 [V, H, W], normalized; 0 (the mean) where missing.
        """
        positions, passed = trace_back(self._space, self._leads, self.wind_hours, wind_ms, self._passed)
        present = np.array(self._data.at(self._carried, start))
        if self._anomalies:
            assert anomaly is not None
            present[self._places] = anomaly[self._anomalies]
        carried = interpolate(self._space, present, positions)
        values = (np.concatenate([carried, passed.astype(np.float32)]) - self._mean) / self._std
        x[self._rows] = np.nan_to_num(values)
