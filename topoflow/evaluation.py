"""Score a model on a split, in physical units, and compare it with the baselines on the same samples."""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from topoflow.baselines import Baselines
from topoflow.bases import fit_persistence, fit_ridge_together
from topoflow.checkpoint.directory import CheckpointDirectory
from topoflow.checkpoint.state import load_weights, read_everywhere
from topoflow.config import TrainConfig
from topoflow.data.assembly import ForecastData
from topoflow.data.batch import Batch, Layout, make_batch
from topoflow.data.channels import input_channels
from topoflow.data.dataset import ForecastDataset
from topoflow.data.forecast_error import WeatherErrors
from topoflow.data.normalization import Normalization
from topoflow.data.sampling import build_eval_loader
from topoflow.data.variables import known_or_plain
from topoflow.errors import ConfigError, RunDirectoryError, StopRequested
from topoflow.forecast_case import ForecastCase
from topoflow.metrics import Record, ScoreSums, format_scores, write_scores
from topoflow.physics.climatology import BLOCK_HOURS, contiguous_blocks
from topoflow.physics.ridge_base import RidgeForecasts
from topoflow.ranks import Context
from topoflow.run_dir import RunDirectory
from topoflow.spread import ErrorCounts, Spread
from topoflow.text import shorten

log = logging.getLogger(__name__)

CASE_TARGET, CASE_LEAD_HOURS = "pm25", 24
"""Target and lead time of the plotted case; the first of the data set if it lacks these."""


def evaluate_best(
    context: Context,
    model: nn.Module,
    data: ForecastData,
    normalization: Normalization,
    config: TrainConfig,
    directory: RunDirectory,
) -> None:
    """Score the best checkpoint of a run (its last, without a validation split) on the test split, if it has one.

    Raises:
        MissingPath, ResumeRefused: there is no usable checkpoint.
        RunDirectoryError: another job has taken the run over; see also `evaluate_model`.
    """
    if "test" not in data.splits:
        return
    context.watch.enter("evaluation")
    with context.together("run directory"):
        if context.is_main:
            directory.require_held()
    checkpoints = CheckpointDirectory(directory.checkpoints)
    path, saved = read_everywhere(context, checkpoints.choose_best_or_last, parts=("model",))
    load_weights(context, model, saved["model"])
    log.info("scoring %s on the test split", path)
    evaluate_model(context, model, data, normalization, "test", config, directory.evaluation)


def evaluate_model(
    context: Context,
    model: nn.Module,
    data: ForecastData,
    normalization: Normalization,
    split: str,
    config: TrainConfig,
    output: Path,
    errors: WeatherErrors | None = None,
) -> list[Record]:
    """Score `model` on a split; rank 0 writes scores.json, scores.csv, skill.png and case.png to `output`.

    Call it on all ranks, with the model itself (not wrapped by DDP: ranks may have different numbers of batches).
    Every rank gets the same records, one per target and lead (see `topoflow.metrics`). Batches have
    config.micro_batch_size samples, the precision is config.precision. Scores do not depend on the number of ranks,
    and on the batch size only as far as the network's own rounding does. `errors`: of the weather after the start.

    Raises:
        ConfigError: the config gives no range for `split`.
        TrainingDiverged: a forecast is not finite.
        RunDirectoryError: on rank 0, if `output` cannot be written.
        StopRequested: a signal arrived on any rank.
    """
    if split not in data.splits:
        raise ConfigError(f"data.{split}: no range is configured: expected at least one to score")
    with context.together("samples"):
        dataset = data.dataset(split, normalization, errors, context.watch.tick)
    evaluator = Evaluator(
        context=context,
        model=model,
        dataset=dataset,
        elevation_m=torch.from_numpy(data.source.heights_m()).to(context.device),
        precision=config.precision,
        batch_size=config.micro_batch_size,
        threads=data.config.threads,
    )
    log.info("evaluation of the %s split: %d samples from %d start times", split, len(dataset), len(dataset.starts))
    ahead = [channel.name for channel in input_channels(data.config) if channel.hours > 0]
    if errors is not None:
        log.info(
            "forecast error: inputs after the start (%s) are correlated with those of the data by %s",
            shorten(ahead, 4),
            errors.skill.describe(errors.hours),
        )
    elif data.forecasts is not None:
        log.info("inputs after the start (%s) are forecasts of %s", shorten(ahead, 4), data.config.forecast)
    elif ahead:
        log.warning(
            "perfect prognosis: inputs after the start (%s) come from the data, as if forecast without error",
            shorten(ahead, 4),
        )
    validation = data.starts("validation").starts if data.config.validation else None
    baselines = evaluator.fit_baselines(data.times("train"), data.starts("train").starts, validation)
    observed = evaluator.sum_observations()
    spread = None
    if data.config.validation and split != "validation":
        with context.together("samples"):
            calibration = data.dataset("validation", normalization, errors, context.watch.tick)
        spread = replace(evaluator, dataset=calibration).measure_spread()
    records = evaluator.score(baselines, observed, spread)
    if context.is_main:
        # imported here because matplotlib takes 0.4 s and hundreds of files, and only rank 0 draws
        from topoflow.plots import plot_case, plot_skill

        log.info("the %s split is %s", split, data.relation_to_training(split))
        log.info("%s", format_scores(records))
        case = evaluator.select_case(baselines, observed)
        try:
            write_scores(records, output)
            plot_skill(records, output / "skill.png")
            if case is not None:
                plot_case(case, output / "case.png")
        except OSError as error:
            raise RunDirectoryError(f"{output}: cannot be written: {error.strerror or error}") from None
        log.info("scores and plots written to %s", output)
    return records


class PhysicalSamples:
    """A ForecastDataset whose samples also contain the targets in the units of the data, NaN where missing.

    `present` holds them at the start, float32 [T, H, W], and `observed` at the lead, of the shape of y, so that scores
    compare with the measured values and not with values normalized and denormalized again. With a base, `mean` holds
    its forecast.
    """

    def __init__(self, dataset: ForecastDataset):
        self.dataset = dataset
        names = ("observed", *(("mean",) if dataset.base else ()))
        of_start = (torch.float32, (len(dataset.target_names), *dataset.data.grid.shape))
        self.layout: Layout = {**dataset.layout, "present": of_start, **dict.fromkeys(names, dataset.layout["y"])}

    def __len__(self) -> int:
        return len(self.dataset)

    def fill(self, indices: Sequence[int], batch: Batch) -> None:
        """Write the samples `indices` into `batch`."""
        self.dataset.fill(indices, {name: batch[name] for name in (*self.dataset.layout, "mean") if name in batch})
        at, names, positions = self.dataset.data.at, self.dataset.target_names, self.dataset.positions
        for row, i in enumerate(indices):
            pairs = self.dataset.pairs(i)
            batch["present"].numpy()[row] = at(names, positions(pairs[0])[0])
            for observed, pair in zip(by_pair(batch["observed"][row]).numpy(), pairs, strict=True):
                observed[:] = at(names, positions(pair)[1])


def by_pair(fields: torch.Tensor) -> torch.Tensor:
    """Return a view by (start, lead) pair, [pairs, T, H, W], of fields [..., T, H, W] of one or more samples."""
    return fields.reshape(-1, *fields.shape[-3:])


class HostCopy:
    """A copy of a tensor on the host. A GPU makes it when it has computed the tensor, and the host works meanwhile."""

    def __init__(self, tensor: torch.Tensor):
        self._copy = tensor.to("cpu", non_blocking=True)  # from a GPU, torch copies into page-locked memory
        self._done = None
        if tensor.device.type == "cuda":
            self._done = torch.cuda.Event()
            self._done.record()

    def wait(self) -> torch.Tensor:
        """Return the tensor, once it has arrived."""
        if self._done is not None:
            self._done.synchronize()
        return self._copy


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a model on the samples of one split.

    elevation_m: terrain height in metres, [H, W], on the device of the model. threads: that load batches.
    """

    context: Context
    model: nn.Module
    dataset: ForecastDataset
    elevation_m: torch.Tensor
    precision: str
    batch_size: int
    threads: int

    def report_progress_or_stop(self) -> None:
        """Report progress to the other ranks, or stop if any rank was asked to; call it after each piece of work.

        Raises:
            StopRequested: a stop signal arrived on this rank, or on another as far as is known here.
        """
        self.context.watch.tick()
        name = self.context.stop_requested()
        if name is not None:
            raise StopRequested(f"stopped by {name} during the evaluation; the next start repeats it")

    def fit_baselines(
        self, training_times: np.ndarray, training_starts: np.ndarray, validation_starts: np.ndarray | None = None
    ) -> Baselines:
        """Fit the baselines on the training split; on the validation split, if there is one, the ridge's strengths."""
        context, dataset, report = self.context, self.dataset, self.report_progress_or_stop
        source, names, leads = dataset.data, dataset.target_names, dataset.lead_times_hours
        fitted = fit_persistence(context, source, names, leads, training_times, training_starts, report)
        starts = training_starts, validation_starts
        ridge = fit_ridge_together(context, source, names, leads, *starts, fitted[-1], report)
        forecasts = None
        if ridge is None:
            log.info("ridge baseline: left out, as it would take hours for so many cells and start times")
        else:
            with context.together("forecasts of the ridge"):
                forecasts = RidgeForecasts(source, names, fitted[-1], ridge, dataset.starts, on_progress=report)
        return Baselines(fitted[0], fitted[1] if len(fitted) > 1 else None, forecasts)

    def sum_observations(self) -> np.ndarray:
        """Return sum and number of observations, in the units of the data: float64 [2, starts, leads, targets].

        Only cells in the mask count. Each hour is read once, by one rank.
        """
        context, dataset = self.context, self.dataset
        steps = np.asarray(dataset.lead_times_hours) // dataset.data.step_hours
        at_lead = dataset.starts[:, None] + steps  # [starts, leads]
        hours, position = np.unique(at_lead, return_inverse=True)
        sums = np.zeros((2, len(hours), len(dataset.target_names)))
        with context.together("reading the observations"):
            for number, block in enumerate(contiguous_blocks(hours, BLOCK_HOURS)):
                if number % context.world_size == context.rank:
                    self.report_progress_or_stop()
                    rows = np.searchsorted(hours, block)
                    for t, name in enumerate(dataset.target_names):
                        values = dataset.data.read(name, block)[:, dataset.data.mask].astype(np.float64)
                        sums[0, rows, t] = np.nansum(values, axis=1)
                        sums[1, rows, t] = np.sum(~np.isnan(values), axis=1)
        context.all_reduce_sum(torch.from_numpy(sums))
        return sums[:, position.reshape(at_lead.shape)]

    def measure_spread(self) -> Spread | None:
        """Return the spread of the errors on this split, the same on every rank; None if a target has none."""
        dataset, leads = self.dataset, len(self.dataset.lead_times_hours)
        constants = dataset.normalization
        mean, std = (np.array([of[name] for name in dataset.target_names]) for of in (constants.mean, constants.std))
        errors = ErrorCounts(mean, std, leads)
        with self.context.together("errors on the validation split"):
            for batch, forecast in self.forecasts("validation"):
                observed, valid = by_pair(batch["observed"]).double().numpy(), by_pair(batch["valid"]).numpy()
                errors.add(self.pairs(batch) % leads, self.to_physical(forecast, batch), observed, valid)
        self.context.all_reduce_sum(torch.from_numpy(errors.counts))
        return Spread.measured(errors)

    def score(self, baselines: Baselines, observed: np.ndarray, spread: Spread | None = None) -> list[Record]:
        """Return the records of `ScoreSums.finish`, the same on every rank; `observed`: from `sum_observations`.

        Raises:
            TrainingDiverged: a forecast is not finite.
        """
        context, dataset = self.context, self.dataset
        variables = [known_or_plain(name, dataset.data.units[name]) for name in dataset.target_names]
        scale = np.array([variable.display_scale for variable in variables])[:, None, None]
        units = {variable.name: variable.display_unit for variable in variables}
        total, count = observed.sum(axis=1)  # [leads, targets]
        mean = scale[:, :, 0] * (total / np.maximum(count, 1)).T
        leads = dataset.lead_times_hours
        sums = ScoreSums(
            len(dataset.starts), dataset.target_names, leads, units, mean, baselines.damped, spread is not None
        )
        with context.together("evaluation"):
            for batch, normalized in self.forecasts("evaluation"):
                pairs, forecast = self.pairs(batch), self.to_physical(normalized, batch)
                observations = by_pair(batch["observed"]).double().numpy()
                inside, crps = 0.0, 0.0
                if spread is not None:
                    inside, crps = spread.judge(pairs % len(leads), forecast, observations)
                baseline_forecasts, filled = forecast_baselines(baselines, dataset, batch)
                sums.add(
                    pairs,
                    scale * forecast,
                    scale * observations,
                    by_pair(batch["valid"]).numpy(),
                    {name: scale * values for name, values in baseline_forecasts.items()},
                    filled,
                    inside,
                    scale * crps,
                )
        context.all_reduce_sum(torch.from_numpy(sums.rows))
        return sums.finish()

    def pairs(self, batch: Batch) -> np.ndarray:
        """Return the (start, lead) pairs of a batch, int64 [B], or [B * leads] if its samples have all leads."""
        return np.array([pair for i in batch["index"].tolist() for pair in self.dataset.pairs(i)])

    def forecasts(self, what: str) -> Iterator[tuple[Batch, HostCopy]]:
        """Yield this rank's batches, each with its forecast after the next was queued: a GPU computes meanwhile.

        what: is done, for the progress bar.
        """
        samples, context = PhysicalSamples(self.dataset), self.context
        loader = build_eval_loader(samples, self.batch_size, context.rank, context.world_size, self.threads)
        shown = context.is_main and sys.stderr.isatty()
        before = None
        for _, batch in tqdm(loader, desc=what, unit="batch", leave=False, disable=not shown):
            self.report_progress_or_stop()
            queued = batch, self.forward(batch)
            if before is not None:
                yield before
            before = queued
        if before is not None:
            yield before

    def forward(self, batch: Mapping[str, torch.Tensor]) -> HostCopy:
        """Return normalized forecasts, of the shape of y, without waiting for the device."""
        device, was_training = self.elevation_m.device, self.model.training
        x, lead_time_hours = (batch[name].to(device, non_blocking=True) for name in ("x", "lead_time_hours"))
        wind_ms = batch["wind_ms"].to(device, non_blocking=True) if "wind_ms" in batch else None
        self.model.eval()
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            normalized = self.model(x, lead_time_hours, self.elevation_m, wind_ms)
        self.model.train(was_training)
        return HostCopy(normalized)

    def to_physical(self, forecast: HostCopy, batch: Batch) -> np.ndarray:
        """Return forecasts [pairs, T, H, W] of a batch in the units of the data, float64; waits for the copy.

        Negative concentrations are kept as the network gives them.
        """
        mean = by_pair(batch["mean"]).double().numpy() if "mean" in batch else None
        return self.dataset.denormalize(by_pair(forecast.wait()).double().numpy(), mean)

    def select_case(self, baselines: Baselines, observed: np.ndarray) -> ForecastCase | None:
        """Return the forecast with the highest observed mean, None if the target was never observed.

        Forecasts with less than half of the most observations are left out. The choice depends on observations alone.
        """
        dataset, data = self.dataset, self.dataset.data
        names, leads = dataset.target_names, dataset.lead_times_hours
        t = names.index(CASE_TARGET) if CASE_TARGET in names else 0
        k = leads.index(CASE_LEAD_HOURS) if CASE_LEAD_HOURS in leads else 0
        total, count = observed[:, :, k, t]
        if count.max() == 0:
            return None
        row = int(np.where(count >= count.max() / 2, total / np.maximum(count, 1), -np.inf).argmax())
        i, number = divmod(row * len(leads) + k, dataset.pairs_per_sample)
        batch = make_batch(PhysicalSamples(dataset), [i])
        forecast = self.to_physical(self.forward(batch), batch)[number, t]
        valid, observed_there = (by_pair(batch[name])[number, t].numpy() for name in ("valid", "observed"))
        truth = np.where(valid, observed_there.astype(np.float64), np.nan)
        # leave out cells that the network could not learn: the target was never observed there in training
        known = data.mask & (baselines.hourly.climatology.filled[t] == 0).any(axis=0)
        variable, start = known_or_plain(names[t], data.units[names[t]]), int(dataset.starts[row])
        return ForecastCase(
            lat2d=data.grid.lat2d,
            lon2d=data.grid.lon2d,
            elevation_m=data.static_fields.get("elevation"),
            truth=variable.display_scale * truth,
            forecast=variable.display_scale * np.where(known, forecast, np.nan),
            wind_ms=data.at(("u", "v"), start) if {"u", "v"} <= set(data.dynamic) else None,
            name=variable.long_name,
            unit=variable.display_unit,
            start=data.times[start],
            lead_hours=leads[k],
        )


def forecast_baselines(
    baselines: Baselines, dataset: ForecastDataset, batch: Batch
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return `Baselines.forecast` of each (start, lead) pair of a batch, stacked along a new first dimension."""
    times, forecasts, filled = dataset.data.times, [], []
    for present, index in zip(batch["present"].double().numpy(), batch["index"].tolist(), strict=True):
        for pair in dataset.pairs(index):
            start, target, _ = dataset.positions(pair)
            lead = pair % len(dataset.lead_times_hours)
            forecast, is_filled = baselines.forecast(present, times, start, target, lead)
            forecasts.append(forecast)
            filled.append(is_filled)
    return {name: np.stack([forecast[name] for forecast in forecasts]) for name in forecasts[0]}, np.stack(filled)
