"""Hierarchical ridge regression: the anomaly at the lead from past anomalies of the cell and of the cells around it.

One solution is pooled over all cells; each cell fits what that leaves with a solution of its own, in the first
CELL_FEATURES of the `topoflow.physics.ridge_features`. Both are shrunk towards 0. The training starts are divided into
folds by blocks of time, and each fold is forecast by a fit to the others where a network learns what the ridge leaves.
The strengths are those with the least error on the validation split, or on the folds if there is none. A forecast is
climatology plus anomaly; it uses nothing after its start.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from topoflow.physics.persistence import DampedPersistence
from topoflow.physics.ridge_features import CELL_FEATURES, GriddedFields, RidgeFeatures, parts

EVERY = 7
"""Only each 7th start is fitted to, which scores the same on China 2019 and Beijing as fitting to all of them.

7 and 24 have no common factor, so all hours of the day occur.
"""
FOLDS, LONGEST_BLOCK_HOURS = 5, 240
"""Folds, and the length of a block of one: blocks alternate between the folds."""
POOLED_STRENGTHS = (1e6, 1e5, 1e4, 1e3, 1e2, 1e1)
CELL_STRENGTHS = (np.inf, 3e4, 1e4, 3e3, 1e3, 3e2, 1e2, 3e1)
"""To choose from; they are added to the diagonal of the normal equations. Infinite: cells have no own solution."""
SUMS_BYTES = 2_000_000_000
"""Limit on the normal equations that are held at once."""


@dataclass(frozen=True)
class Ridge:
    """The coefficients of the features, between anomalies over deviation.

    Attributes:
        pooled: [1 + FOLDS, T, leads, features]: fitted to all training starts, then to all but those of each fold.
        own: [1 + FOLDS, T, leads, CELL_FEATURES, cells], what a cell adds to the pooled coefficients, in raster order;
            the cells are those that are known for any target.
        strengths: [T, leads, 2], chosen for the pooled solution and for those of the cells.
        known: [T, H, W] 1 where the target was observed in training, else 0: there the climatology is the forecast.
        blocks: [2], begin of the first block of time in hours since 1970, and the length of each in hours.
    """

    pooled: np.ndarray
    own: np.ndarray
    strengths: np.ndarray
    known: np.ndarray
    blocks: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all that was fitted, by name."""
        return dict(vars(self))

    @property
    def cells(self) -> np.ndarray:
        """Cells that are known for any target: bool [H, W]."""
        return np.logical_or.reduce(self.known > 0)

    def forecast_anomalies(
        self,
        features: RidgeFeatures,
        starts: np.ndarray,
        in_training: bool = False,
        on_progress: Callable[[], None] = lambda: None,
    ) -> np.ndarray:
        """Return the anomalies over deviation at the leads: float32 [n, leads, T, cells].

        Args:
            features: of the same targets, with the same `known`.
            starts: positions in the times of the data, increasing [n].
            in_training: forecast each start by the fit that left its fold out.
            on_progress: called for each block of starts.
        """
        leads, targets = self.pooled.shape[2], len(self.known)
        found = np.zeros((len(starts), leads, targets, int(self.cells.sum())), np.float32)
        solution = 1 + _folds(features.source.times[starts], self.blocks) if in_training else np.zeros(len(starts), int)
        for rows in features.blocks(starts):
            on_progress()
            past = features.summarize(features.read_anomalies(starts[rows]), starts[rows])
            of_solution = [(k, np.flatnonzero(solution[rows] == k)) for k in np.unique(solution[rows])]
            for t, cells in enumerate(features.columns):
                for part in parts(len(cells), len(rows)):
                    anomaly = np.zeros((leads, len(cells[part]), len(rows)))
                    for f, feature in enumerate(features.of_target(t, past, part)):
                        for k, columns in of_solution:
                            coefficient = np.tile(self.pooled[k, t, :, f, None], len(cells[part]))  # [leads, cells]
                            if f < CELL_FEATURES:
                                coefficient += self.own[k, t, :, f, cells[part]].T
                            anomaly[:, :, columns] += coefficient[:, :, None] * feature[:, columns]
                    found[rows[:, None], :, t, cells[part]] = anomaly.transpose(2, 1, 0)
        return found


def fit_ridge(
    source: GriddedFields,
    targets: Sequence[str],
    lead_times_hours: Sequence[int],
    training_starts: np.ndarray,
    validation_starts: np.ndarray | None,
    mask: np.ndarray,
    persistence: DampedPersistence,
    only: Sequence[str] | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> Ridge:
    """Fit the ridge in float64.

    The data are read once, or several times if the normal equations of all targets exceed SUMS_BYTES.

    Args:
        training_starts: positions in `source.times`, increasing int64.
        validation_starts: likewise, to choose the strengths; None chooses them by the folds.
        mask: bool [H, W], the cells that count.
        persistence: fitted on the training split for all `targets`.
        only: the targets to fit. Arrays of other targets are zero, so that the arrays of processes that fit different
            targets can be added.
        on_progress: called for each block that is read.
    """
    known = mask & (persistence.climatology.filled == 0).any(axis=1)
    features = RidgeFeatures(source, targets, persistence, known)
    leads, cells = len(lead_times_hours), int(features.cells.sum())
    shape = (1 + FOLDS, len(targets), leads)
    pooled, own = np.zeros((*shape, features.count)), np.zeros((*shape, CELL_FEATURES, cells))
    strengths, fitted_to = np.zeros((*shape[1:], 2)), np.zeros(known.shape)
    blocks = _blocks_of_time(source.times[training_starts])
    asked = [t for t, name in enumerate(targets) if only is None or name in only]
    bytes_of_target = (1 + FOLDS) * 8 * leads * cells * CELL_FEATURES * (features.count + 1)
    at_once = max(SUMS_BYTES // max(bytes_of_target, 1), 1)
    for chosen in (asked[first : first + at_once] for first in range(0, len(asked), at_once)):
        training = _sum_up(features, chosen, lead_times_hours, training_starts[::EVERY], blocks, on_progress)
        validation = None
        if validation_starts is not None:
            validation = _sum_up(features, chosen, lead_times_hours, validation_starts[::EVERY], blocks, on_progress)
        for i, (t, folds) in enumerate(zip(chosen, training, strict=True)):
            on_progress()
            total = _combine(np.add, *folds)
            others = [_combine(np.subtract, total, fold) for fold in folds]
            checks, fits = folds, others
            if validation is not None:
                checks, fits = [_combine(np.add, *validation[i])], [total]
            strengths[t] = [_choose_strengths(checks, fits, k) for k in range(leads)]
            for solution, fit in enumerate((total, *others)):
                for k, (for_all, for_cell) in enumerate(strengths[t]):
                    pooled[solution, t, k] = fit.solve_pooled(k, for_all)
                    found = fit.solve_own(k, pooled[solution, t, k], for_cell)
                    own[solution, t, k][:, features.columns[t]] = found.T
            fitted_to[t] = known[t]
    return Ridge(pooled, own, strengths, fitted_to, blocks)


def _blocks_of_time(times: np.ndarray) -> np.ndarray:
    """Return `Ridge.blocks` for training starts at `times`, increasing; each fold has some if there are FOLDS hours."""
    hours = times[[0, -1]].astype("datetime64[h]").astype(np.int64)
    span = hours[1] - hours[0] + 1
    return np.array([hours[0], min(-(-span // FOLDS), LONGEST_BLOCK_HOURS)], np.float64)


def _folds(times: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Return the fold of starts at `times`: int64 [n]."""
    begin, length = blocks.astype(np.int64)
    return (times.astype("datetime64[h]").astype(np.int64) - begin) // length % FOLDS


class _NormalEquations:
    """Sums over the samples of a target, for each lead: those of all cells and those of each cell."""

    def __init__(self, leads: int, features: int, cells: int):
        self.squares, self.products = np.zeros((leads, features, features)), np.zeros((leads, features))
        self.total = np.zeros(leads)  # of the squared anomalies at the lead
        self.own_squares = np.zeros((leads, cells, CELL_FEATURES, features))
        self.own_products = np.zeros((leads, cells, CELL_FEATURES))

    def add_samples(self, part: slice, x: np.ndarray, y: np.ndarray) -> None:
        """Add the features x [cells, n, features] and anomalies at the leads y [leads, cells, n], NaN where missing."""
        flat = x.reshape(-1, x.shape[2])
        for k, anomaly in enumerate(y):
            exists = np.isfinite(anomaly)
            value = np.where(exists, anomaly, 0.0)
            counted = x * exists[..., None]
            self.squares[k] += counted.reshape(flat.shape).T @ flat
            self.products[k] += flat.T @ value.ravel()
            self.total[k] += np.square(value).sum()
            of_cell = counted[..., :CELL_FEATURES].transpose(0, 2, 1)
            self.own_squares[k, part] += of_cell @ x
            self.own_products[k, part] += (of_cell @ value[..., None])[..., 0]

    def solve_pooled(self, k: int, strength: float) -> np.ndarray:
        """Return the pooled coefficients [features] of a lead."""
        return np.linalg.solve(self.squares[k] + strength * np.eye(len(self.squares[k])), self.products[k])

    def solve_own(self, k: int, pooled: np.ndarray, strength: float) -> np.ndarray:
        """Return what each cell adds to the pooled coefficients: [cells, CELL_FEATURES]."""
        if np.isinf(strength):
            return np.zeros_like(self.own_products[k])
        matrix = self.own_squares[k, :, :, :CELL_FEATURES] + strength * np.eye(CELL_FEATURES)
        return np.linalg.solve(matrix, self._left(k, pooled)[..., None])[..., 0]

    def error(self, k: int, pooled: np.ndarray, own: np.ndarray) -> float:
        """Return the sum of the squared errors of forecasts with these coefficients."""
        error = self.total[k] - 2 * pooled @ self.products[k] + pooled @ self.squares[k] @ pooled
        explained = np.einsum("cij,cj->ci", self.own_squares[k, :, :, :CELL_FEATURES], own)
        return float(error + np.sum(own * (explained - 2 * self._left(k, pooled))))

    def _left(self, k: int, pooled: np.ndarray) -> np.ndarray:
        """Return the cells' products with what the pooled coefficients leave: [cells, CELL_FEATURES]."""
        return self.own_products[k] - self.own_squares[k] @ pooled


def _combine(function: np.ufunc, *parts: _NormalEquations) -> _NormalEquations:
    """Return the sums of all parts (np.add), or those of the samples of the first that are not in the second."""
    found = _NormalEquations(0, 0, 0)
    for name in vars(found):
        setattr(found, name, functools.reduce(function, [getattr(part, name) for part in parts]))
    return found


def _sum_up(
    features: RidgeFeatures,
    chosen: Sequence[int],
    lead_times_hours: Sequence[int],
    starts: np.ndarray,
    blocks: np.ndarray,
    on_progress: Callable[[], None],
) -> list[list[_NormalEquations]]:
    """Return the normal equations of each target with an index in `chosen`, for each fold."""
    leads, cells = len(lead_times_hours), [len(features.columns[t]) for t in chosen]
    sums = [[_NormalEquations(leads, features.count, count) for _ in range(FOLDS)] for count in cells]
    folds = _folds(features.source.times[starts], blocks)
    for rows in features.blocks(starts):
        on_progress()
        anomaly = features.read_anomalies(starts[rows], max(lead_times_hours))
        past = features.summarize(anomaly, starts[rows])
        place = features.steps_to(starts[rows]) + np.array(lead_times_hours)[:, None] // features.source.step_hours
        for t, of_folds in zip(chosen, sums, strict=True):
            at_lead = anomaly[t][features.columns[t]]
            for part in parts(len(at_lead), len(rows)):
                x = np.stack(list(features.of_target(t, past, part)), axis=2)
                y = at_lead[part][:, place].transpose(1, 0, 2)
                for fold in np.unique(folds[rows]):
                    columns = folds[rows] == fold
                    of_folds[fold].add_samples(part, x[:, columns], y[:, :, columns])
    return sums


def _choose_strengths(
    checks: Sequence[_NormalEquations], fits: Sequence[_NormalEquations], k: int
) -> tuple[float, float]:
    """Return the strengths with the least error at lead k over all checks: the pooled one, then that of the cells.

    fits: the samples to which the forecast of each check is fitted.
    """
    none = np.zeros_like(fits[0].own_products[k])
    candidates = [[fit.solve_pooled(k, strength) for fit in fits] for strength in POOLED_STRENGTHS]
    errors = [
        sum(check.error(k, pooled, none) for check, pooled in zip(checks, solutions, strict=True))
        for solutions in candidates
    ]
    best = int(np.argmin(errors))
    errors = [
        sum(
            check.error(k, pooled, fit.solve_own(k, pooled, strength))
            for check, fit, pooled in zip(checks, fits, candidates[best], strict=True)
        )
        for strength in CELL_STRENGTHS
    ]
    return POOLED_STRENGTHS[best], CELL_STRENGTHS[int(np.argmin(errors))]
