"""Forecast samples: the state at one hour, and the targets some hours later."""

import numpy as np
import torch

from topoflow.config.schema import DataConfig
from topoflow.data.normalization import Normalization
from topoflow.data.source import GriddedSource
from topoflow.data.variables import VARIABLES
from topoflow.errors import ConfigError

_HOUR = np.timedelta64(1, "h")


def input_names(config: DataConfig) -> tuple[str, ...]:
    """Names of the network's input channels, in order: data.variables, then `available` if it is configured."""
    return (*config.variables, *(("available",) if config.availability else ()))


class ForecastDataset(torch.utils.data.Dataset):
    """(start, lead) pairs: sample i is start i // n_leads with lead i % n_leads.

    Arguments: the source; the normalization of all inputs and targets; starts, int64 [n], positions in source.times,
    each with a complete window behind it; the data section; mask, bool [H, W], the cells that count; with_wind, to add
    the wind of the whole field in m/s. Fields keep the row order of the data.
    """

    def __init__(
        self,
        source: GriddedSource,
        normalization: Normalization,
        starts: np.ndarray,
        config: DataConfig,
        mask: np.ndarray,
        with_wind: bool,
    ):
        self.source = source
        self.normalization = normalization
        self.starts = np.asarray(starts, np.int64)
        self.mask = mask
        self.with_wind = with_wind
        self.lead_times_hours = tuple(config.lead_times_hours)
        self.input_names = input_names(config)
        self.target_names = tuple(config.targets)
        self._dynamic = [name for name in self.input_names if VARIABLES[name].kind == "dynamic"]
        if config.availability and not self._dynamic:
            raise ConfigError("data.availability: true: expected data.variables with one that changes in time")
        self._rows = [self.input_names.index(name) for name in self._dynamic]
        self._clock = [(row, name) for row, name in enumerate(self.input_names) if name.startswith(("hour_", "day_"))]
        self._input_mean, self._input_std = self._constants(self._dynamic)
        self._target_mean, self._target_std = self._constants(self.target_names)
        self._template = self._static_channels()

    def __len__(self) -> int:
        return len(self.starts) * len(self.lead_times_hours)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """Sample i, all on CPU.

        x: float32 [V, H, W], normalized, 0 (the mean) where missing; y: float32 [T, H, W], normalized, 0 where not
        valid; valid: bool [T, H, W], the target has a value and the mask counts the cell; lead_time_hours: float32 [];
        wind_ms: float32 [2, H, W], m/s, if asked for, a missing value being the mean of those present (0 without any);
        index: int64 [], which is i.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        start, lead = self._start_and_lead(i)
        target = self.source.snapshot(self.target_names, start + lead)
        valid = ~np.isnan(target) & self.mask
        y = np.where(valid, (target - self._target_mean) / self._target_std, np.float32(0))
        sample = {
            "x": torch.from_numpy(self._inputs(start)),
            "y": torch.from_numpy(y),
            "valid": torch.from_numpy(valid),
            "lead_time_hours": torch.tensor(float(lead), dtype=torch.float32),
            "index": torch.tensor(i, dtype=torch.int64),
        }
        if self.with_wind:
            sample["wind_ms"] = torch.from_numpy(self._wind(start))
        return sample

    def sample_identity(self, i: int) -> str:
        """Which sample that is, whatever the split it is taken from: "2019-01-01T05+12h"."""
        start, lead = self._start_and_lead(i)
        return f"{self.source.times[start]}+{lead}h"

    def _start_and_lead(self, i: int) -> tuple[int, int]:
        start, lead = divmod(int(i), len(self.lead_times_hours))
        return int(self.starts[start]), self.lead_times_hours[lead]

    def _constants(self, names: list[str] | tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        """(mean, std), each float32 [len(names), 1, 1]."""
        pairs = [(self.normalization.mean[name], self.normalization.std[name]) for name in names]
        mean, std = np.array(pairs, np.float32).reshape(-1, 2).T[..., None, None]
        return mean, std

    def _static_channels(self) -> np.ndarray:
        """float32 [V, H, W]: the channels that are the same in every sample, 0 in the others."""
        template = np.zeros((len(self.input_names), *self.source.grid.shape), np.float32)
        for row, name in enumerate(self.input_names):
            if VARIABLES[name].kind == "static" or name in ("lat2d", "lon2d"):
                template[row] = np.nan_to_num(self.normalization.normalize(name, self.source.static(name)))
        return template

    def _inputs(self, start: int) -> np.ndarray:
        x = self._template.copy()
        fields = self.source.snapshot(self._dynamic, start)
        missing = np.isnan(fields)
        fields -= self._input_mean
        fields /= self._input_std
        fields[missing] = 0
        x[self._rows] = fields
        if self.input_names[-1] == "available":
            x[-1] = 1 - missing.mean(axis=0, dtype=np.float32)
        for row, name in self._clock:
            x[row] = _clock_value(name, self.source.times[start])
        return x

    def _wind(self, start: int) -> np.ndarray:
        wind = self.source.snapshot(("u", "v"), start)
        for component in wind:
            missing = np.isnan(component)
            if missing.any():
                component[missing] = component[~missing].mean(dtype=np.float64) if not missing.all() else 0
        return wind


def _clock_value(name: str, time: np.datetime64) -> float:
    """hour_sin, hour_cos, day_sin or day_cos at `time`; days count from 1 to 366 and turn once in 365.25."""
    day, year = time.astype("datetime64[D]"), time.astype("datetime64[Y]").astype("datetime64[D]")
    hour_of_day, day_of_year = int((time - day) / _HOUR), (day - year).astype(int) + 1
    turn = hour_of_day / 24 if name.startswith("hour_") else day_of_year / 365.25
    return float((np.sin if name.endswith("_sin") else np.cos)(2 * np.pi * turn))
