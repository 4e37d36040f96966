"""Fields in memory, as fitting reads them from a data set."""

from dataclasses import dataclass

import numpy as np


@dataclass
class ArraySource:
    """Fields in memory, float32 [T, H, W] by name."""

    times: np.ndarray
    fields: dict[str, np.ndarray]
    step_hours: int = 1

    def read(self, name, indices):
        return self.fields[name][indices]


def make_source(hours=24 * 12, shape=(2, 3), seed=0, step_hours=1):
    rng = np.random.default_rng(seed)
    times = np.datetime64("2019-03-01T05", "h") + step_hours * np.arange(hours)
    fields = {}
    for name in ("pm25", "o3"):
        noise = np.cumsum(rng.standard_normal((hours, *shape)), axis=0)
        daily = 20 * np.sin(2 * np.pi * np.arange(hours) / 24)[:, None, None]
        values = (1000 + daily + noise).astype(np.float32)
        values[rng.random(values.shape) < 0.15] = np.nan
        fields[name] = values
    return ArraySource(times, fields, step_hours)
