"""The loader of the published program (AmmarKheder/TopoFlow, topoflow/data.py), reimplemented for comparison.

It opens each store through xarray. For a sample it reads one variable after the other, normalizes it and interpolates
it to the size of the network, including static fields and even if it already has that size.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F


class PublishedSamples(torch.utils.data.Dataset):
    """(x [V, H, W], y [T, H, W], lead_time_hours []) of one store, in the order of the original.

    Arguments: the store; names of inputs and targets; {name: (mean, deviation)}; lead times; (H, W) of the network.
    """

    def __init__(
        self,
        store: Path,
        inputs: Sequence[str],
        targets: Sequence[str],
        constants: Mapping[str, tuple[float, float]],
        lead_times_hours: Sequence[int],
        shape: tuple[int, int],
    ):
        import xarray as xr

        self.fields = xr.open_zarr(store, consolidated=(store / ".zmetadata").exists())
        self.inputs, self.targets, self.constants = inputs, targets, constants
        self.leads, self.shape = lead_times_hours, shape
        rows, columns = (
            np.linspace(0, self.fields.sizes[d] - 1, n) for d, n in zip(("lat", "lon"), shape, strict=True)
        )
        lat, lon = (
            np.interp(at, np.arange(self.fields.sizes[d]), self.fields[d].values)
            for d, at in (("lat", rows), ("lon", columns))
        )
        lon2d, lat2d = np.meshgrid(lon, lat)
        self.coordinates = {"lat2d": lat2d.astype(np.float32), "lon2d": lon2d.astype(np.float32)}

    def __len__(self) -> int:
        return (self.fields.sizes["time"] - max(self.leads) - 1) * len(self.leads)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        start, lead = divmod(i, len(self.leads))
        hours = self.leads[lead]
        x = np.stack([self._input(name, start) for name in self.inputs])
        y = torch.stack([self._resized(self._read(name, start + hours), name) for name in self.targets])
        return torch.from_numpy(x).float(), y.float(), torch.tensor(hours, dtype=torch.float32)

    def _input(self, name: str, hour: int) -> np.ndarray:
        if name in self.coordinates:
            mean, deviation = self.constants[name]
            return (self.coordinates[name] - mean) / deviation
        return self._resized(self._read(name, hour), name).numpy()

    def _read(self, name: str, hour: int) -> np.ndarray:
        variable = self.fields[name]
        return (variable.isel(time=hour) if "time" in variable.dims else variable).values

    def _resized(self, values: np.ndarray, name: str) -> torch.Tensor:
        mean, deviation = self.constants[name]
        field = torch.from_numpy((values - mean) / deviation).float()[None, None]
        return F.interpolate(field, size=self.shape, mode="bilinear", align_corners=False)[0, 0]
