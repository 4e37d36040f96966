"""Forecast samples: the state at one hour, and the targets some hours later."""

from collections.abc import Sequence

import numpy as np
import torch

from topoflow.config import DataConfig
from topoflow.data.batch import Batch, Layout, make_batch
from topoflow.data.fields import FieldSource, serial_pieces
from topoflow.data.normalization import Normalization
from topoflow.data.variables import VARIABLES
from topoflow.errors import ConfigError

_HOUR = np.timedelta64(1, "h")
_PIECE_BYTES = 256 * 2**10
"""Amount normalized at once, so that the second pass finds it in the processor's cache."""

_Run = tuple[slice, slice]
"""Consecutive rows of a sample, and the consecutive fields that they are made of."""


def input_names(config: DataConfig) -> tuple[str, ...]:
    """Names of the network's input channels, in order: data.variables, then `available` if it is configured."""
    return (*config.variables, *(("available",) if config.availability else ()))


class ForecastDataset(torch.utils.data.Dataset):
    """(start, lead) pairs: sample i is start i // n_leads with lead i % n_leads.

    Arguments: the source; the normalization of all inputs and targets; starts, int64 [n], positions in source.times,
    each with a complete window behind it; the data section; mask, bool [H, W], the cells that count; with_wind, to add
    the wind of the whole field in m/s. Fields keep the row order of the data. layout: of one sample, see `__getitem__`.
    """

    def __init__(
        self,
        source: FieldSource,
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
        dynamic = [name for name in self.input_names if VARIABLES[name].kind == "dynamic"]
        if config.availability and not dynamic:
            raise ConfigError("data.availability: true: expected a variable that changes in time in data.variables")
        self._n_dynamic = len(dynamic)
        self._clock = [(row, name) for row, name in enumerate(self.input_names) if name.startswith(("hour_", "day_"))]
        self._static = [row for row, name in enumerate(self.input_names) if _is_static(name)]
        self._input_mean, self._input_std = self._constants(self.input_names)
        self._target_mean, self._target_std = self._constants(self.target_names)
        # in the order in which they lie, so that a source may give a view of them
        wind = ("u", "v") if with_wind else ()
        self._start_names = tuple(name for name in source.dynamic if name in (*dynamic, *wind))
        self._lead_names = tuple(name for name in source.dynamic if name in self.target_names)
        self._input_runs = self._runs(self.input_names, self._start_names)
        self._target_runs = self._runs(self.target_names, self._lead_names)
        self._wind_fields = [self._start_names.index(name) for name in wind]
        self._template = self._static_channels()
        # all bits set where the mask includes the cell, none elsewhere: the fastest way to set zeros
        self._mask_bits = None if mask.all() else np.where(mask, np.int32(-1), np.int32(0))
        self.layout = self._sample_layout()

    def __len__(self) -> int:
        return len(self.starts) * len(self.lead_times_hours)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """Sample i, all on CPU.

        x: float32 [V, H, W], normalized, 0 (the mean) where missing; y: float32 [T, H, W], normalized, 0 where not
        valid; valid: bool [T, H, W], the target has a value and the mask counts the cell; lead_time_hours: float32 [];
        wind_ms: float32 [2, H, W], m/s, if asked for, a missing value being the mean of those present (0 without any);
        index: int64 [], which is i.
        """
        return {name: values[0] for name, values in self.batch([i]).items()}

    def batch(self, indices: Sequence[int]) -> Batch:
        """A batch of the samples `indices`, stacked along a new first dimension; see `fill`."""
        return make_batch(self, indices)

    def fill(self, indices: Sequence[int], batch: Batch) -> None:
        """Write the samples `indices` into `batch`, whose tensors are as `layout` says with a new first dimension.

        Inputs of one start are made once for all its leads in the batch.
        """
        arrays = {name: values.numpy() for name, values in batch.items()}
        x, y, valid, leads = (arrays[name] for name in ("x", "y", "valid", "lead_time_hours"))
        wind = arrays["wind_ms"] if self.with_wind else np.empty((len(indices), 0), np.float32)
        arrays["index"][:] = indices
        made: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for row, i in enumerate(indices):
            start, leads[row] = self._start_and_lead(i)
            if start in made:
                x[row], wind[row] = made[start]
            else:
                self._fill_inputs(start, x[row], wind[row])
                made[start] = x[row], wind[row]
            self._fill_targets(start + int(leads[row]), y[row], valid[row])

    def sample_identity(self, i: int) -> str:
        """Return a name of the sample that does not depend on the split: "2019-01-01T05+12h"."""
        start, lead = self._start_and_lead(i)
        return f"{self.source.times[start]}+{lead}h"

    def _start_and_lead(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        start, lead = divmod(int(i), len(self.lead_times_hours))
        return int(self.starts[start]), self.lead_times_hours[lead]

    def _constants(self, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        """(mean, std), each float32 [len(names), 1, 1]."""
        pairs = [(self.normalization.mean[name], self.normalization.std[name]) for name in names]
        mean, std = np.array(pairs, np.float32).reshape(-1, 2).T[..., None, None]
        return mean, std

    def _sample_layout(self) -> Layout:
        shape, targets = self.source.grid.shape, len(self.target_names)
        layout = {
            "x": (torch.float32, (len(self.input_names), *shape)),
            "y": (torch.float32, (targets, *shape)),
            "valid": (torch.bool, (targets, *shape)),
            "lead_time_hours": (torch.float32, ()),
            "index": (torch.int64, ()),
        }
        return {**layout, "wind_ms": (torch.float32, (2, *shape))} if self.with_wind else layout

    def _static_channels(self) -> np.ndarray:
        """float32 [V, H, W]: the channels that are the same in every sample, 0 in the others."""
        template = np.zeros((len(self.input_names), *self.source.grid.shape), np.float32)
        for row, name in enumerate(self.input_names):
            if _is_static(name):
                template[row] = np.nan_to_num(self.normalization.normalize(name, self.source.static(name)))
        return template

    def _runs(self, rows: tuple[str, ...], fields: tuple[str, ...]) -> list[_Run]:
        """Which rows are which fields, in runs of at most _PIECE_BYTES (or one field)."""
        most = max(1, _PIECE_BYTES // (4 * self.source.grid.lat2d.size))
        runs: list[_Run] = []
        for row, name in enumerate(rows):
            if name not in fields:
                continue
            field = fields.index(name)
            if runs and (runs[-1][0].stop, runs[-1][1].stop) == (row, field) and field - runs[-1][1].start < most:
                runs[-1] = slice(runs[-1][0].start, row + 1), slice(runs[-1][1].start, field + 1)
            else:
                runs.append((slice(row, row + 1), slice(field, field + 1)))
        return runs

    def _fill_inputs(self, start: int, x: np.ndarray, wind: np.ndarray) -> None:
        """x [V, H, W] and wind [2 or 0, H, W] of the sample that starts at hour `start`."""
        for row in self._static:
            x[row] = self._template[row]
        fields = self.source.hour(self._start_names, start)
        with_availability = self.input_names[-1] == "available"
        absent: np.ndarray | int = 0
        for rows, of_fields in self._input_runs:
            values = x[rows]
            np.subtract(fields[of_fields], self._input_mean[rows], out=values)
            np.divide(values, self._input_std[rows], out=values)
            if with_availability:
                absent = absent + np.isnan(values).sum(axis=0, dtype=np.float32)
            _zero_nan(values)
        if with_availability:
            x[-1] = 1 - absent / np.float32(self._n_dynamic)
        for row, name in self._clock:
            x[row] = _clock_value(name, self.source.times[start])
        for component, field in zip(wind, self._wind_fields, strict=True):
            component[:] = fields[field]
            missing = np.isnan(component)
            if missing.any():
                component[missing] = component[~missing].mean(dtype=np.float64) if not missing.all() else 0

    def _fill_targets(self, hour: int, y: np.ndarray, valid: np.ndarray) -> None:
        """y and valid [T, H, W] of the targets at `hour`."""
        fields = self.source.hour(self._lead_names, hour)
        for rows, of_fields in self._target_runs:
            values, counts = y[rows], valid[rows]
            np.equal(fields[of_fields], fields[of_fields], out=counts)  # a NaN is not
            np.subtract(fields[of_fields], self._target_mean[rows], out=values)
            np.divide(values, self._target_std[rows], out=values)
            _zero_nan(values)
            if self._mask_bits is not None:
                np.logical_and(counts, self.mask, out=counts)
                bits = values.view(np.int32)
                np.bitwise_and(bits, self._mask_bits, out=bits)


def _zero_nan(values: np.ndarray) -> None:
    """Replace NaN by 0 in one pass; numpy takes two, and is many times slower if there are any."""
    for piece in serial_pieces(values):
        torch.nan_to_num_(piece, nan=0.0, posinf=np.inf, neginf=-np.inf)


def _is_static(name: str) -> bool:
    return VARIABLES[name].kind == "static" or name in ("lat2d", "lon2d")


def _clock_value(name: str, time: np.datetime64) -> float:
    """hour_sin, hour_cos, day_sin or day_cos at `time`; days count from 1 to 366 and turn once in 365.25."""
    day, year = time.astype("datetime64[D]"), time.astype("datetime64[Y]").astype("datetime64[D]")
    hour_of_day, day_of_year = int((time - day) / _HOUR), (day - year).astype(int) + 1
    turn = hour_of_day / 24 if name.startswith("hour_") else day_of_year / 365.25
    return float((np.sin if name.endswith("_sin") else np.cos)(2 * np.pi * turn))
