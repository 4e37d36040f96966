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
    field that does not change, it is the mean along the path of that air. Those that `prepare` has made are read.

    Args:
        channels: all of the network.
        as_anomalies: targets that are carried as the present anomaly over its deviation. They are never prepared.

    Attributes:
        wind_hours: hours after the start, increasing, of the wind that `fill` needs; () if it needs none.
        rows: of the channels in the inputs.
    """

    def __init__(
        self,
        data: PreparedData,
        normalization: Normalization,
        channels: Sequence[Channel],
        as_anomalies: Sequence[str],
    ):
        self._data = data
        advected = [channel for channel in channels if channel.advected]
        first = channels.index(advected[0])
        self.rows = slice(first, first + len(advected))
        self._leads = sorted({channel.hours for channel in advected})
        names = list(dict.fromkeys(channel.variable for channel in advected))
        makes = {name: [Channel(name, lead, advected=True).name for lead in self._leads] for name in names}
        prepared = [name for name in names if name not in as_anomalies and {*makes[name]} <= {*data.dynamic}]
        traced = [name for name in names if name not in prepared]
        self._carried = tuple(name for name in traced if name in data.dynamic)
        passed = [name for name in traced if name not in data.dynamic]
        self._prepared = tuple(channel for name in prepared for channel in makes[name])
        # where each kind goes among `names`
        self._of_prepared, self._of_carried, self._of_passed = (
            [names.index(name) for name in kind] for kind in (prepared, self._carried, passed)
        )
        self.wind_hours = wind_hours(channels) if traced else ()
        self._space = IndexSpace(data.grid.lat2d, data.grid.lon2d) if traced else None
        self._passed = np.array([data.static(name) for name in passed], np.float32).reshape(-1, *data.grid.shape)
        self._mean, self._std = normalization.constants([channel.variable for channel in advected])
        # by number among the carried, the place among the targets
        places = {name: place for place, name in enumerate(as_anomalies)}
        self._anomalies = {k: places[name] for k, name in enumerate(self._carried) if name in places}
        for row, channel in enumerate(advected):
            if channel.variable in places:
                assert normalization.base is not None
                self._mean[row], self._std[row] = 0, normalization.base.deviation[places[channel.variable]]

    def fill(self, start: int, wind_ms: np.ndarray, anomaly: np.ndarray | None, x: np.ndarray) -> None:
        """Write the channels of a forecast from position `start` of the data's times.

        Args:
            wind_ms: u and v at wind_hours, float32 [n, 2, H, W], m/s, none missing.
            anomaly: [T, H, W], that of the targets at the start, if channels are anomalies.
            x: the channels, float32 [n, H, W], normalized; NaN where missing.
        """
        shape = (-1, len(self._leads), *x.shape[1:])
        made = x.reshape(shape)  # a view
        if self._prepared:
            made[self._of_prepared] = self._data.at(self._prepared, start).reshape(shape)
        if self._space is not None:
            positions, means = trace_back(self._space, self._leads, self.wind_hours, wind_ms, self._passed)
            present = np.array(self._data.at(self._carried, start))
            for k, place in self._anomalies.items():
                assert anomaly is not None
                present[k] = anomaly[place]
            made[self._of_carried] = interpolate(self._space, present, positions)
            made[self._of_passed] = means
        x -= self._mean
        x /= self._std
