"""How values are held in fewer bits, and what that costs."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from topoflow.data.moments import Moments, moments_of
from topoflow.data.prepared.days import DayRecord
from topoflow.data.prepared.manifest import PreparedVariable
from topoflow.errors import ConfigError

DTYPES = {"float32": "<f4", "float16": "<f2"}
_SAMPLED_HOURS = 24


def choose_variables(
    units: Mapping[str, str], dtype: str, times: np.ndarray, read: Callable[[np.ndarray], np.ndarray]
) -> tuple[PreparedVariable, ...]:
    """Return the variables with the constants of `dtype`, "<f4" or "<f2".

    float32 holds values as they are. float16 has 11 bits, so it holds (value - offset) / scale: offset is about the
    mean and scale about the standard deviation of some hours, a power of two, so that dividing by it costs nothing.
    Data appended later keep these constants; float16 reaches to 65504 of such deviations.

    Args:
        units: {name: unit}, in the order in which the variables lie.
        dtype: of the array.
        times: of the data.
        read: float32 [n, V, H, W] at positions [n] of `times`.
    """
    if dtype == "<f4":
        return tuple(PreparedVariable(name, unit, 1.0, 0.0) for name, unit in units.items())
    hours = np.unique(np.linspace(0, len(times) - 1, _SAMPLED_HOURS).astype(np.int64))
    fields = read(hours)
    variables = []
    for column, (name, unit) in enumerate(units.items()):
        found = moments_of(fields[:, column])
        scale = 2.0 ** round(math.log2(found.std)) if found.count and found.std > 0 else 1.0
        variables.append(PreparedVariable(name, unit, scale, float(np.float32(found.mean))))
    return tuple(variables)


def encode(variable: PreparedVariable, values: np.ndarray, dtype: str) -> np.ndarray:
    """Values float32 of any shape as the array holds them. ConfigError if one is beyond the reach of its type."""
    if dtype == "<f4":
        return values
    with np.errstate(over="ignore"):
        stored = ((values - np.float32(variable.offset)) / np.float32(variable.scale)).astype(dtype)
    if np.isinf(stored).any():
        largest = float(np.nanmax(np.abs(values)))
        raise ConfigError(
            f"dtype: float16: variable {variable.name!r} has values up to {largest:g} {variable.unit}, too far from "
            f"{variable.offset:g} for its scale {variable.scale:g}: expected dtype: float32"
        )
    return stored


def decode(variable: PreparedVariable, stored: np.ndarray) -> np.ndarray:
    """float32: what is read back, to the bit."""
    if stored.dtype == np.float32:
        return stored
    values = stored.astype(np.float32)
    values *= np.float32(variable.scale)
    values += np.float32(variable.offset)
    return values


def cost(values: np.ndarray, read_back: np.ndarray) -> tuple[float, float]:
    """(largest difference, sum of its squares) where there are values, in their unit."""
    difference = (values.astype(np.float64) - read_back)[~np.isnan(values)]
    if difference.size == 0:
        return 0.0, 0.0
    return float(np.abs(difference).max()), float(np.square(difference).sum())


def sum_up(variable: PreparedVariable, days: Sequence[DayRecord]) -> PreparedVariable:
    """The variable with what its precision cost over all days."""
    moments = functools.reduce(Moments.merge, (day.moments[variable.name] for day in days), Moments())
    errors = [day.errors[variable.name] for day in days if variable.name in day.errors]
    squares = math.fsum(total for _, total in errors)
    return replace(
        variable,
        error_max=max((largest for largest, _ in errors), default=0.0),
        error_rms=math.sqrt(squares / moments.count) if moments.count else 0.0,
        std=moments.std if moments.count else None,
    )
