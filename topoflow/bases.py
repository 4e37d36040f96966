"""Fit the closed-form forecasts together on all ranks: as base of the network, and as baselines."""

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from topoflow.data.assembly import ForecastData
from topoflow.data.normalization import Base
from topoflow.data.prepared.reader import PreparedData
from topoflow.errors import ConfigError, DataError
from topoflow.physics.climatology import covers_the_year
from topoflow.physics.persistence import DampedPersistence, fit_damped_persistence
from topoflow.physics.ridge import Ridge, fit_ridge
from topoflow.physics.ridge_base import RidgeBase
from topoflow.ranks import Context

log = logging.getLogger(__name__)

LEAST_DEVIATION = 1e-6
"""Anomalies below this fraction of the largest climatological value are rounding errors."""
RIDGE_SAMPLES = 50_000_000
"""Largest number of cells times training starts for which a ridge is fitted: it takes some minutes."""


def fit_base(kind: str, data: ForecastData, context: Context) -> Base:
    """Fit the base `kind`, a value of model.base, on the training split; in float32, the same bits on all ranks.

    Raises:
        ConfigError, DataError: on every rank; a target has no anomalies, or the data are too large for a ridge.
    """
    targets, leads, starts = data.target_names, data.config.lead_times_hours, data.splits["train"].starts
    report = context.watch.tick
    fitted = fit_persistence(context, data.source, targets, leads, data.times("train"), starts, report)
    persistence = fitted[0] if kind == "damped" else fitted[-1]
    if kind != "damped" and not persistence.climatology.is_seasonal:
        log.warning(
            "model.base: the training split does not cover the seasons of a year, so the climatology of the base is "
            "that by hour of day"
        )
    for name, deviation, hourly in zip(targets, persistence.deviation, persistence.climatology.hourly, strict=True):
        if not deviation > LEAST_DEVIATION * np.abs(hourly).max():  # also if there are no values
            raise DataError(
                f"model.base: {name!r} has no anomalies in the training split: expected several days of values that "
                "differ from the mean of their hour, or model.base=none"
            )
    persistence = DampedPersistence.from_arrays(_in_float32(persistence.arrays()))
    if kind != "ridge":
        return persistence
    validation = data.splits["validation"].starts if "validation" in data.splits else None
    ridge = fit_ridge_together(context, data.source, targets, leads, starts, validation, persistence, report)
    if ridge is None:
        raise ConfigError(
            f"model.base: ridge is for at most {RIDGE_SAMPLES:,} cells times training starts: expected seasonal"
        )
    return RidgeBase(persistence, Ridge(**_in_float32(ridge.arrays())))


def _in_float32(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def restore_base(arrays: dict[str, np.ndarray]) -> Base:
    """Return the base that has the `arrays`."""
    return RidgeBase.from_arrays(arrays) if "ridge_pooled" in arrays else DampedPersistence.from_arrays(arrays)


def fit_persistence(
    context: Context,
    source: PreparedData,
    targets: Sequence[str],
    lead_times_hours: Sequence[int],
    training_times: np.ndarray,
    training_starts: np.ndarray,
    on_progress: Callable[[], None],
) -> list[DampedPersistence]:
    """Fit damped persistence about the hourly climatology and, if the training split covers the year, the seasonal one.

    Each rank fits some of the targets; the result does not depend on the number of ranks.
    """
    with context.together("fitting climatology and persistence"):
        fitted = fit_damped_persistence(
            source,
            targets,
            lead_times_hours,
            training_times,
            training_starts,
            source.mask,
            seasonal=covers_the_year(source.times[training_times]),
            only=targets[context.rank :: context.world_size],
            on_progress=on_progress,
        )
    for damped in fitted:
        for name, array in damped.arrays().items():
            if name != "lead_times_hours":
                context.all_reduce_sum(torch.from_numpy(array))
    return fitted


def fit_ridge_together(
    context: Context,
    source: PreparedData,
    targets: Sequence[str],
    lead_times_hours: Sequence[int],
    training_starts: np.ndarray,
    validation_starts: np.ndarray | None,
    persistence: DampedPersistence,
    on_progress: Callable[[], None],
) -> Ridge | None:
    """Fit the ridge about the climatology of `persistence`, each rank some of the targets; None if it would take hours.

    The result does not depend on the number of ranks.
    """
    known = source.mask & persistence.known
    if known.sum() * len(training_starts) > RIDGE_SAMPLES:
        return None
    with context.together("fitting the ridge"):
        ridge = fit_ridge(
            source,
            targets,
            lead_times_hours,
            training_starts,
            validation_starts,
            source.mask,
            persistence,
            only=targets[context.rank :: context.world_size],
            on_progress=on_progress,
        )
    for name, array in ridge.arrays().items():
        if name != "blocks":
            context.all_reduce_sum(torch.from_numpy(array))
    return ridge
