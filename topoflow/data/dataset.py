"""Forecast samples: the inputs of a start, and the targets some hours later."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from topoflow.config import DataConfig
from topoflow.data.anomalies import PresentAnomalies
from topoflow.data.batch import Batch, Layout, make_batch
from topoflow.data.channels import input_channels, input_names
from topoflow.data.inputs import InputReader, WeatherAhead, runs, zero_nan
from topoflow.data.normalization import Normalization
from topoflow.data.prepared.reader import PreparedData
from topoflow.errors import ConfigError


class ForecastDataset(torch.utils.data.Dataset):
    """Samples of (start, lead) pairs: pair p is start p // n_leads with lead p % n_leads.

    A sample is one pair, sample i pair i; or, if joint, sample i is start i with the pairs of all its leads.

    Arguments: the data; the normalization of all inputs and targets; starts, int64 [n], positions in data.times, each
    with a complete window about it; the data section; with_wind, to add the wind of the whole field in m/s; joint;
    in_training, that the base was fitted to these starts; ahead, the weather after the start, None as in the data;
    on_progress, called now and then. layout: of one sample, see `__getitem__`. pairs_per_sample: 1, or n_leads if
    joint. Raises ConfigError for other lead times than those of the base.
    """

    def __init__(
        self,
        data: PreparedData,
        normalization: Normalization,
        starts: np.ndarray,
        config: DataConfig,
        with_wind: bool,
        joint: bool = False,
        in_training: bool = False,
        ahead: WeatherAhead | None = None,
        on_progress: Callable[[], None] = lambda: None,
    ):
        self.data = data
        self.normalization = normalization
        self.starts = np.asarray(starts, np.int64)
        self.with_wind = with_wind
        self.lead_times_hours = tuple(config.lead_times_hours)
        self.joint = joint
        self.pairs_per_sample = len(self.lead_times_hours) if joint else 1
        self.input_names = input_names(config)
        self.target_names = tuple(config.targets)
        self.base = normalization.base
        self._anomalies = None if self.base is None else PresentAnomalies(data, self.target_names, self.base)
        as_anomalies = self.target_names if config.anomalies else ()
        self._inputs = InputReader(data, normalization, input_channels(config), with_wind, as_anomalies, ahead)
        self._target_mean, self._target_std = normalization.constants(self.target_names)
        if self.base is not None:
            fitted = [int(hours) for hours in self.base.lead_times_hours]
            if fitted != list(self.lead_times_hours):
                raise ConfigError(
                    f"data.lead_times_hours: {list(self.lead_times_hours)}: expected {fitted}, those of the base"
                )
            self._forecasts = self.base.forecasts_from(data, self.target_names, self.starts, in_training, on_progress)
            self._target_std = self.base.deviation.astype(np.float32)[:, None, None]
        # in the order in which they lie, so that the data may give a view of them
        self._lead_names = tuple(name for name in data.dynamic if name in self.target_names)
        fields = {row: self._lead_names.index(name) for row, name in enumerate(self.target_names)}
        self._target_runs = runs(fields, data.grid.lat2d.size)
        # all bits set where the mask includes the cell, none elsewhere: the fastest way to set zeros
        self._mask_bits = None if data.mask.all() else np.where(data.mask, np.int32(-1), np.int32(0))
        self.layout = self._sample_layout()

    def __len__(self) -> int:
        return len(self.starts) * len(self.lead_times_hours) // self.pairs_per_sample

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """Sample i, all on CPU.

        x: float32 [V, H, W], normalized, 0 (the mean) where missing; y: float32 [T, H, W], normalized, 0 where not
        valid; valid: bool [T, H, W], the target has a value and the mask counts the cell; lead_time_hours: float32 [];
        wind_ms: float32 [2, H, W], m/s, if asked for, a missing value being the mean of those present (0 without any);
        index: int64 [], which is i. If joint, y, valid and lead_time_hours have a first dimension more, the leads.
        """
        return {name: values[0] for name, values in self.batch([i]).items()}

    def batch(self, indices: Sequence[int]) -> Batch:
        """A batch of the samples `indices`, stacked along a new first dimension; see `fill`."""
        return make_batch(self, indices)

    def fill(self, indices: Sequence[int], batch: Batch) -> None:
        """Write the samples `indices` into `batch`, whose tensors are as `layout` says with a new first dimension.

        Inputs of one start are made once for all its leads in the batch. If the batch has a `mean` of the shape of y
        too, it gets the forecast of the base, from which y is the difference.
        """
        arrays = {name: values.numpy() for name, values in batch.items()}
        x, wind = arrays["x"], arrays["wind_ms"] if self.with_wind else np.empty((len(indices), 0), np.float32)
        arrays["index"][:] = indices
        made: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray | None]] = {}
        for row, i in enumerate(indices):
            start, _, _ = self.positions(self.pairs(i)[0])
            if start in made:
                x[row], wind[row], anomaly = made[start]
            else:
                anomaly = None if self._anomalies is None else self._anomalies.at(start)
                self._inputs.fill(start, x[row], wind[row], anomaly)
                made[start] = x[row], wind[row], anomaly
            for number, pair in enumerate(self.pairs(i)):
                place = (row, number) if self.joint else row
                _, target, arrays["lead_time_hours"][place] = self.positions(pair)
                mean = self._target_mean if anomaly is None else self._base_forecast(pair, start, anomaly)
                if "mean" in arrays:
                    arrays["mean"][place] = mean
                self._fill_targets(target, mean, arrays["y"][place], arrays["valid"][place])

    def _base_forecast(self, pair: int, start: int, anomaly: np.ndarray) -> np.ndarray:
        return self._forecasts.forecast(start, pair % len(self.lead_times_hours), anomaly)

    def denormalize(self, values: np.ndarray, mean: np.ndarray | None) -> np.ndarray:
        """Return what normalized `values` [pairs, T, H, W] are in the units of the data.

        mean: that of the same pairs, as `fill` writes it; needed with a base only.
        """
        if self.base is not None:
            return values * self.base.deviation[:, None, None] + mean
        names, denormalize = self.target_names, self.normalization.denormalize
        return np.stack([denormalize(name, values[:, t]) for t, name in enumerate(names)], axis=1)

    def pairs(self, i: int) -> range:
        """Return the pairs of sample i."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return range(int(i) * self.pairs_per_sample, (int(i) + 1) * self.pairs_per_sample)

    def positions(self, pair: int) -> tuple[int, int, int]:
        """Return the positions of start and target of a pair in the data's times, and its lead in hours."""
        number, lead = divmod(pair, len(self.lead_times_hours))
        start, hours = int(self.starts[number]), self.lead_times_hours[lead]
        return start, start + hours // self.data.step_hours, hours

    def sample_identity(self, i: int) -> str:
        """Return a name of the sample that does not depend on the split: "2019-01-01T05+12h", or "...+12,24,48h"."""
        positions = [self.positions(pair) for pair in self.pairs(i)]
        return f"{self.data.times[positions[0][0]]}+{','.join(str(hours) for _, _, hours in positions)}h"

    def _sample_layout(self) -> Layout:
        leads = (len(self.lead_times_hours),) if self.joint else ()
        targets = (*leads, len(self.target_names), *self.data.grid.shape)
        layout = {
            "x": (torch.float32, self._inputs.shape),
            "y": (torch.float32, targets),
            "valid": (torch.bool, targets),
            "lead_time_hours": (torch.float32, leads),
            "index": (torch.int64, ()),
        }
        return {**layout, "wind_ms": (torch.float32, self._inputs.wind_shape)} if self.with_wind else layout

    def _fill_targets(self, position: int, mean: np.ndarray, y: np.ndarray, valid: np.ndarray) -> None:
        """y and valid [T, H, W] of the targets at `position` in the data's times, as differences from `mean`."""
        fields = self.data.at(self._lead_names, position)
        for rows, of_fields in self._target_runs:
            values, counts = y[rows], valid[rows]
            np.equal(fields[of_fields], fields[of_fields], out=counts)  # a NaN is not
            np.subtract(fields[of_fields], mean[rows], out=values)
            np.divide(values, self._target_std[rows], out=values)
            zero_nan(values)
            if self._mask_bits is not None:
                np.logical_and(counts, self.data.mask, out=counts)
                bits = values.view(np.int32)
                np.bitwise_and(bits, self._mask_bits, out=bits)
