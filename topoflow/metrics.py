"""Forecast scores from sums that do not depend on how samples are split into batches or over ranks.

Each sample has its own row of sums in float64. A rank fills the rows of its samples and leaves the others at zero, so
that the sum over ranks is exact; `finish` then adds the rows exactly (math.fsum).
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from topoflow.data.variables import known_or_plain
from topoflow.errors import TrainingDiverged
from topoflow.files import write_atomically
from topoflow.text import format_table

DAMPED = ("damped_persistence", "seasonal_damped_persistence", "ridge")
"""Baselines that start from the present value and from a climatology; all but the first may be absent."""

COLUMNS = (
    "scored",  # number of times the sample was added: 1
    "not_finite",  # NaN or infinite forecasts where an observation counts
    "n",
    "observed",  # in this and the next four: deviations from the observed mean
    "forecast",
    "observed_squared",
    "forecast_squared",
    "product",
    "error",
    "absolute_error",
    "squared_error",
    "potential_error",  # (|f - mean(o)| + |o - mean(o)|)^2, Willmott's denominator
    "within_factor_2",
    "inside",  # this and the next: only if there is a spread
    "crps",
    "climatology_n",
    "climatology_squared_error",
    "climatology_filled",
    "present_n",  # this and the rest: only where the present value exists
    "present_squared_error",
    "persistence_squared_error",
    "present_climatology_n",
    "present_climatology_squared_error",
    *(f"{name}_squared_error" for name in DAMPED),
)

ROUNDING = 1e-13
"""A variance below this fraction of the mean square is rounding error: the values count as constant."""


class ScoreSums:
    """Sums over cells for each sample and target; sample i has start time i // leads and lead i % leads.

    Attributes:
        rows: float64 [samples, targets, len(COLUMNS)]; to be summed over ranks in place before `finish`.
    """

    def __init__(
        self,
        num_starts: int,
        targets: Sequence[str],
        lead_times_hours: Sequence[int],
        units: Mapping[str, str],
        observed_mean: np.ndarray,
        damped: Sequence[str] = DAMPED[:1],
        with_spread: bool = False,
    ):
        """Start at zero.

        Args:
            observed_mean: [targets, leads], mean of all observations that count, in `units`.
            damped: those of DAMPED that there are.
            with_spread: `add` gets intervals and CRPS.
        """
        assert observed_mean.shape == (len(targets), len(lead_times_hours)), observed_mean.shape
        self.targets, self.lead_times_hours, self.units = tuple(targets), tuple(lead_times_hours), dict(units)
        self.observed_mean, self.damped = observed_mean.astype(np.float64), tuple(damped)
        self.with_spread = with_spread
        self.rows = np.zeros((num_starts * len(self.lead_times_hours), len(self.targets), len(COLUMNS)))

    def add(
        self,
        samples: np.ndarray,
        forecast: np.ndarray,
        observed: np.ndarray,
        valid: np.ndarray,
        baselines: Mapping[str, np.ndarray],
        filled: np.ndarray,
        inside: np.ndarray | float = 0.0,
        crps: np.ndarray | float = 0.0,
    ) -> None:
        """Add a batch.

        Args:
            samples: sample indices, int64 [B].
            forecast, observed: [B, T, H, W] float64, in the units of `observed_mean`.
            valid: [B, T, H, W] bool, which observations count.
            baselines: {persistence, climatology and those of `damped`}: [B, T, H, W] float64 each, NaN where missing.
            filled: [B, T, H, W] bool, where the climatology is not the cell's own.
            inside: [B, T, H, W] bool, whether the 80 % interval holds the observation.
            crps: [B, T, H, W], the continuous ranked probability score.
        """
        shift = self.observed_mean[:, samples % len(self.lead_times_hours)].T[:, :, None, None]
        finite = np.isfinite(forecast)
        counts = valid & finite
        # np.where before the arithmetic, as NaN x 0 is NaN; other values become the mean, with error 0
        o = np.where(counts, observed, shift)
        f = np.where(counts, forecast, shift)
        o_deviation, f_deviation, error = o - shift, f - shift, f - o
        present = counts & np.isfinite(baselines["persistence"])
        has_climatology = counts & np.isfinite(baselines["climatology"])
        has_both = present & has_climatology

        def squared_error_of(name: str, where: np.ndarray) -> np.ndarray:
            return np.where(where, baselines[name] - o, 0.0) ** 2

        values = {
            "not_finite": valid & ~finite,
            "n": counts,
            "observed": o_deviation,
            "forecast": f_deviation,
            "observed_squared": o_deviation**2,
            "forecast_squared": f_deviation**2,
            "product": o_deviation * f_deviation,
            "error": error,
            "absolute_error": np.abs(error),
            "squared_error": error**2,
            "potential_error": (np.abs(f_deviation) + np.abs(o_deviation)) ** 2,
            "within_factor_2": counts & within_factor_2(f, o),
            "inside": counts * inside,
            "crps": np.where(counts, crps, 0.0),
            "climatology_n": has_climatology,
            "climatology_squared_error": squared_error_of("climatology", has_climatology),
            "climatology_filled": has_climatology & filled,
            "present_n": present,
            "present_squared_error": np.where(present, error, 0.0) ** 2,
            "persistence_squared_error": squared_error_of("persistence", present),
            "present_climatology_n": has_both,
            "present_climatology_squared_error": squared_error_of("climatology", has_both),
        }
        values |= {f"{name}_squared_error": squared_error_of(name, has_both) for name in self.damped}
        for name, of_cells in values.items():
            # each sum runs over one contiguous row of cells, so that batches do not change the order of additions
            self.rows[samples, :, COLUMNS.index(name)] += of_cells.reshape(*forecast.shape[:2], -1).sum(axis=-1)
        self.rows[samples, :, 0] += 1

    def finish(self) -> list[dict[str, object]]:
        """Return one record per target and lead, ordered by target; scores that are not defined are None.

        Raises:
            TrainingDiverged: a forecast was not finite where an observation counts.
        """
        assert (self.rows[:, :, 0] == 1).all(), "each sample must be added once: sum the rows over ranks first"
        leads = len(self.lead_times_hours)
        records = []
        for t, target in enumerate(self.targets):
            for k, lead in enumerate(self.lead_times_hours):
                columns = self.rows[k::leads, t].T.tolist()
                sums = {name: math.fsum(values) for name, values in zip(COLUMNS, columns, strict=True)}
                if sums["not_finite"]:
                    raise TrainingDiverged(
                        f"evaluation: {int(sums['not_finite'])} forecasts of {target} at {lead} h are not finite"
                    )
                head = {"target": target, "lead_hours": lead, "unit": self.units[target]}
                scores = scores_of(sums, float(self.observed_mean[t, k]))
                absent = [f"{name}_rmse" for name in DAMPED if name not in self.damped]
                absent += [] if self.with_spread else ["crps", "coverage_80"]
                records.append(head | scores | dict.fromkeys(absent))
        return records


def within_factor_2(forecast: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Return whether 0.5 <= f / o <= 2 (Chang & Hanna 2004, Meteorol. Atmos. Phys. 87), computed without division.

    Only a zero forecast is within a factor of 2 of a zero observation, and no negative value is within a factor of 2
    of any other.
    """
    return (0.5 * observed <= forecast) & (forecast <= 2.0 * observed)


def scores_of(sums: Mapping[str, float], observed_mean: float) -> dict[str, object]:
    """Return the scores of one target and lead from its sums by column name; those that are not defined are None.

    Index of agreement: 1 - sum (f - o)^2 / sum (|f - mean(o)| + |o - mean(o)|)^2, Willmott 1981 (Phys. Geogr. 2).
    Normalized mean bias: sum (f - o) / sum o, a fraction. Correlation: Pearson, over all samples and cells at once.
    """
    n, present, both = sums["n"], sums["present_n"], sums["present_climatology_n"]
    agreement = _ratio(sums["squared_error"], sums["potential_error"])
    return {
        "n": int(n),
        "rmse": _root(_ratio(sums["squared_error"], n)),
        "mae": _ratio(sums["absolute_error"], n),
        "bias": _ratio(sums["error"], n),
        "nmb": _ratio(sums["error"], sums["observed"] + n * observed_mean),
        "correlation": _correlation(sums),
        "ioa": None if agreement is None else 1.0 - agreement,
        "fac2": _ratio(sums["within_factor_2"], n),
        "crps": _ratio(sums["crps"], n),
        "coverage_80": _ratio(sums["inside"], n),
        "persistence_rmse": _root(_ratio(sums["persistence_squared_error"], present)),
        "climatology_rmse": _root(_ratio(sums["climatology_squared_error"], sums["climatology_n"])),
        **{f"{name}_rmse": _root(_ratio(sums[f"{name}_squared_error"], both)) for name in DAMPED},
        "n_where_present": int(present),
        "rmse_where_present": _root(_ratio(sums["present_squared_error"], present)),
        "climatology_rmse_where_present": _root(_ratio(sums["present_climatology_squared_error"], both)),
        "n_climatology_filled": int(sums["climatology_filled"]),
    }


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator != 0 else None


def _root(value: float | None) -> float | None:
    return None if value is None else math.sqrt(value)


def _correlation(sums: Mapping[str, float]) -> float | None:
    n = sums["n"]
    if n < 2:
        return None
    mean_o, mean_f = sums["observed"] / n, sums["forecast"] / n
    square_o, square_f = sums["observed_squared"] / n, sums["forecast_squared"] / n
    variance_o, variance_f = square_o - mean_o**2, square_f - mean_f**2
    if variance_o <= ROUNDING * square_o or variance_f <= ROUNDING * square_f:
        return None
    covariance = sums["product"] / n - mean_o * mean_f
    return max(-1.0, min(1.0, covariance / math.sqrt(variance_o * variance_f)))


Record = dict[str, Any]


def write_scores(records: Sequence[Record], folder: Path) -> None:
    """Write scores.json and scores.csv, each atomically; a score that is not defined is null or an empty field."""
    folder.mkdir(parents=True, exist_ok=True)
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    write_atomically(folder / "scores.json", json.dumps(list(records), indent=1, allow_nan=False) + "\n")
    write_atomically(folder / "scores.csv", table.getvalue())


COMPARED = (
    # column of the table, score of the baseline, score of the model on the same samples
    ("persistence", "persistence_rmse", "rmse_where_present"),
    ("climatology", "climatology_rmse", "rmse"),
    ("damped persistence", "damped_persistence_rmse", "rmse_where_present"),
    ("seasonal", "seasonal_damped_persistence_rmse", "rmse_where_present"),
    ("ridge", "ridge_rmse", "rmse_where_present"),
)
NOTES = {
    "seasonal": "seasonal: damped persistence about a climatology with a cycle of the year",
    "ridge": "ridge: linear regression on present and past anomalies of the cell and of those around it",
}
WORTHWHILE = 0.01
"""Share by which a network's RMSE should be below the ridge regression's."""


def format_scores(records: Sequence[Record]) -> str:
    """Return a table of the RMSE of model and baselines per target and lead, and the number of wins of the model.

    Baselines without any score are left out.
    """
    compared = [item for item in COMPARED if any(record[item[1]] is not None for record in records)]
    rows = []
    for record in records:
        decimals = 3 if record["rmse"] is not None and record["rmse"] < 1 else 2
        first = record["lead_hours"] == records[0]["lead_hours"]
        name, unit = (known_or_plain(record["target"]).long_name, record["unit"]) if first else ("", "")
        cells = [_number(record[key], decimals) for key in ("rmse", "rmse_where_present")]
        for _, baseline, model in compared:
            cells.append(_number(record[baseline], decimals) + ("+" if beats(record, baseline, model) else " "))
        rows.append((name, unit, f"{record['lead_hours']} h", *cells))
    wins = [
        f"{label} in {sum(beats(record, baseline, model) for record in records)} of {len(records)}"
        for label, baseline, model in compared
    ]
    lines = [
        "RMSE of the model and of each baseline; + marks a baseline that the model beats on the same samples",
        *format_table(("target", "unit", "lead", "model", "model*", *(f"{label} " for label, *_ in compared)), rows),
        "* model, on the samples of the baselines but climatology: where the present value exists",
        *(NOTES[label] for label, *_ in compared if label in NOTES),
        f"The model beats {', '.join(wins)}.",
    ]
    ratio = mean_ratio(records)
    if ratio is not None:
        lines.append(f"RMSE of the model over that of damped persistence, mean over targets and leads: {ratio:.3f}")
    coverage = [record["coverage_80"] for record in records if record["coverage_80"] is not None]
    if coverage:
        mean = math.fsum(coverage) / len(coverage)
        lines.append(
            f"80 % intervals, from errors on the validation split, hold {mean:.1%} of the observations "
            f"({min(coverage):.1%} to {max(coverage):.1%} by target and lead)"
        )
    over_ridge = mean_ratio(records, "ridge_rmse")
    if over_ridge is not None and over_ridge > 1 - WORTHWHILE:
        lines.append(f"The network adds less than 1 %: its RMSE is {over_ridge:.3f} times the ridge regression's.")
    return "\n".join(lines)


def mean_ratio(records: Sequence[Record], baseline: str = "damped_persistence_rmse") -> float | None:
    """Return the mean over targets and leads of the model's RMSE over a baseline's, on the same samples.

    None if one of them is not defined, or zero.
    """
    pairs = [(record["rmse_where_present"], record[baseline]) for record in records]
    if any(model is None or not other for model, other in pairs):
        return None
    return math.fsum(model / other for model, other in pairs) / len(pairs)


def beats(record: Record, baseline: str, model: str) -> bool:
    """Return whether the model's RMSE is below the baseline's; False if one of them is not defined."""
    return record[model] is not None and record[baseline] is not None and record[model] < record[baseline]


def _number(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"
