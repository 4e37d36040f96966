"""Scores of a model on a split, in physical units, next to the baselines on the same samples."""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from topoflow.baselines import BLOCK_HOURS, Baselines, contiguous_blocks, fit_baselines, hour_of_day
from topoflow.config import TrainConfig
from topoflow.data.assembly import ForecastData
from topoflow.data.batch_memory import Batch, make_batch
from topoflow.data.dataset import ForecastDataset
from topoflow.data.normalization import Normalization
from topoflow.data.sampling import build_eval_loader
from topoflow.data.splits import split_starts, split_times
from topoflow.data.variables import VARIABLES
from topoflow.errors import ConfigError, StopRequested
from topoflow.forecast_case import ForecastCase
from topoflow.metrics import Record, ScoreSums, format_table, write_scores
from topoflow.ranks import Context
from topoflow.run_dir import StopFlag

log = logging.getLogger(__name__)

CASE_TARGET, CASE_LEAD_HOURS = "pm25", 24
"""The case that is drawn is of this target and lead, or of the first there is."""


def evaluate_model(
    context: Context,
    model: nn.Module,
    data: ForecastData,
    normalization: Normalization,
    split: str,
    config: TrainConfig,
    output: Path,
    stop: StopFlag,
) -> list[Record]:
    """Score `model` on a split; rank 0 writes scores.json, scores.csv, skill.png and case.png to `output`.

    All ranks call it, with the model itself (not wrapped by DDP: ranks may hold different numbers of batches), and get
    the same records, one per target and lead (see `topoflow.metrics`). Batches are of config.micro_batch_size, the
    precision is config.precision. Neither batch size nor number of ranks changes a score, but for what the forward
    pass itself makes of the size of a batch.

    Raises:
        ConfigError: the config gives no range for `split`.
        TrainingDiverged: a forecast is not finite.
        StopRequested: a signal arrived on any rank.
    """
    if split not in data.splits:
        raise ConfigError(f"data.{split}: no range is configured: expected at least one to score")
    dataset = data.dataset(split, normalization)
    evaluator = Evaluator(
        context=context,
        model=model,
        dataset=dataset,
        elevation_m=torch.from_numpy(data.grid.heights_m()).to(context.device),
        precision=config.precision,
        batch_size=config.micro_batch_size,
        workers=data.config.workers,
        stop=stop,
    )
    log.info("evaluation of the %s split: %d samples from %d start times", split, len(dataset), len(dataset.starts))
    times = data.source.times
    baselines = evaluator.fit_baselines(
        split_times(times, data.config.train, key="data.train"),
        split_starts(times, data.config.train, dataset.lead_times_hours, key="data.train").starts,
    )
    observed = evaluator.sum_observations()
    records = evaluator.score(baselines, observed)
    if context.is_main:
        write_scores(records, output)
        # here and not above: matplotlib takes 0.4 s and hundreds of files, and only rank 0 draws, when all is scored
        from topoflow.plots import plot_case, plot_skill

        plot_skill(records, output / "skill.png")
        case = evaluator.forecast_case(baselines, observed)
        if case is not None:
            plot_case(case, output / "case.png")
        log.info("%s", format_table(records))
        log.info("scores and plots are in %s", output)
    return records


class PhysicalSamples(torch.utils.data.Dataset):
    """A ForecastDataset whose samples also hold the targets in the units of the data, NaN where missing.

    `present` at the start and `observed` at the lead, float32 [T, H, W] each: scores see what was measured, not what
    came back from its normalized form.
    """

    def __init__(self, dataset: ForecastDataset):
        self.dataset, self.source = dataset, dataset.source
        shape = (len(dataset.target_names), *dataset.source.grid.shape)
        self.layout = {**dataset.layout, "present": (torch.float32, shape), "observed": (torch.float32, shape)}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Batch:
        return {name: values[0] for name, values in make_batch(self, [i]).items()}

    def fill(self, indices: Sequence[int], batch: Batch) -> None:
        """Write the samples `indices` into `batch`."""
        self.dataset.fill(indices, {name: batch[name] for name in self.dataset.layout})
        starts, lead_hours = start_and_lead(self.dataset, np.asarray(indices))
        for name, hours in (("present", starts), ("observed", starts + lead_hours)):
            for row, hour in enumerate(hours):
                batch[name].numpy()[row] = self.source.hour(self.dataset.target_names, int(hour))


@dataclass(frozen=True)
class Evaluator:
    """A model on the samples of one split. elevation_m: [H, W] on the device of the model, metres."""

    context: Context
    model: nn.Module
    dataset: ForecastDataset
    elevation_m: torch.Tensor
    precision: str
    batch_size: int
    workers: int
    stop: StopFlag

    def go_on(self) -> None:
        """Between two pieces of work: others see that there is progress, and a request to stop is heeded.

        Raises:
            StopRequested: this rank has one.
        """
        watch = self.context.watch
        watch.tick()
        if self.stop.signal_name is not None:
            watch.ask_to_stop(self.stop.signal_name)
        name = self.stop.signal_name or watch.stop_asked
        if name is not None:
            raise StopRequested(f"stopped by {name} during the evaluation, which starts anew next time")

    def fit_baselines(self, training_times: np.ndarray, training_starts: np.ndarray) -> Baselines:
        """The baselines of the targets, which ranks share out among them; arguments as `fit_baselines` has them."""
        context, dataset = self.context, self.dataset
        with context.together("fitting the baselines"):
            baselines = fit_baselines(
                dataset.source,
                dataset.target_names,
                dataset.lead_times_hours,
                training_times,
                training_starts,
                dataset.mask,
                only=dataset.target_names[context.rank :: context.world_size],
                on_progress=self.go_on,
            )
        for array in (baselines.climatology, baselines.filled, baselines.slope):
            context.all_reduce_sum(torch.from_numpy(array))
        return baselines

    def sum_observations(self) -> np.ndarray:
        """Sum and number of the observations that count, in the units of the data: float64 [2, starts, leads, targets].

        Each hour is read once, by one rank.
        """
        context, dataset = self.context, self.dataset
        at_lead = dataset.starts[:, None] + np.asarray(dataset.lead_times_hours)  # [starts, leads]
        hours, position = np.unique(at_lead, return_inverse=True)
        sums = np.zeros((2, len(hours), len(dataset.target_names)))
        with context.together("reading the observations"):
            for number, block in enumerate(contiguous_blocks(hours, BLOCK_HOURS)):
                if number % context.world_size == context.rank:
                    self.go_on()
                    rows = np.searchsorted(hours, block)
                    for t, name in enumerate(dataset.target_names):
                        values = dataset.source.read(name, block)[:, dataset.mask].astype(np.float64)
                        sums[0, rows, t] = np.nansum(values, axis=1)
                        sums[1, rows, t] = np.sum(~np.isnan(values), axis=1)
        context.all_reduce_sum(torch.from_numpy(sums))
        return sums[:, position.reshape(at_lead.shape)]

    def score(self, baselines: Baselines, observed: np.ndarray) -> list[Record]:
        """Records of `ScoreSums.finish`, the same on every rank; `observed` as `sum_observations` gives it.

        Raises:
            TrainingDiverged: a forecast is not finite.
        """
        context, dataset = self.context, self.dataset
        scale = np.array([VARIABLES[name].display_scale for name in dataset.target_names])[:, None, None]
        units = {name: VARIABLES[name].display_unit for name in dataset.target_names}
        total, count = observed.sum(axis=1)  # [leads, targets]
        mean = scale[:, :, 0] * (total / np.maximum(count, 1)).T
        sums = ScoreSums(len(dataset.starts), dataset.target_names, dataset.lead_times_hours, units, mean)
        hours = hour_of_day(dataset.source.times)
        loader = build_eval_loader(
            PhysicalSamples(dataset), self.batch_size, context.rank, context.world_size, self.workers
        )
        shown = context.is_main and sys.stderr.isatty()
        with context.together("evaluation"):
            for _, batch in tqdm(loader, desc="evaluation", unit="batch", leave=False, disable=not shown):
                self.go_on()
                samples = batch["index"].numpy()
                starts, lead_hours = start_and_lead(dataset, samples)
                lead = samples % len(dataset.lead_times_hours)
                forecasts, filled = baselines.forecast(
                    batch["present"].double().numpy(), hours[starts], lead, lead_hours
                )
                sums.add(
                    samples,
                    scale * self.predict(batch),
                    scale * batch["observed"].double().numpy(),
                    batch["valid"].numpy(),
                    {name: scale * values for name, values in forecasts.items()},
                    filled,
                )
        context.all_reduce_sum(torch.from_numpy(sums.rows))
        return sums.finish()

    def predict(self, batch: Mapping[str, torch.Tensor]) -> np.ndarray:
        """Forecasts [B, T, H, W] of a batch of samples, in the units of the data, float64.

        As the network gives them: a concentration below zero is not set to zero.
        """
        device, was_training = self.elevation_m.device, self.model.training
        x, lead_time_hours = batch["x"].to(device), batch["lead_time_hours"].to(device)
        wind_ms = batch["wind_ms"].to(device) if "wind_ms" in batch else None
        self.model.eval()
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            normalized = self.model(x, lead_time_hours, self.elevation_m, wind_ms)
        self.model.train(was_training)
        values = normalized.double().cpu().numpy()
        names, denormalize = self.dataset.target_names, self.dataset.normalization.denormalize
        return np.stack([denormalize(name, values[:, t]) for t, name in enumerate(names)], axis=1)

    def forecast_case(self, baselines: Baselines, observed: np.ndarray) -> ForecastCase | None:
        """The forecast whose observed mean is the highest of those with at least half of the most observations.

        So it is chosen by the observations alone. None if the target was never observed.
        """
        dataset, source = self.dataset, self.dataset.source
        names, leads = dataset.target_names, dataset.lead_times_hours
        t = names.index(CASE_TARGET) if CASE_TARGET in names else 0
        k = leads.index(CASE_LEAD_HOURS) if CASE_LEAD_HOURS in leads else 0
        total, count = observed[:, :, k, t]
        if count.max() == 0:
            return None
        row = int(np.where(count >= count.max() / 2, total / np.maximum(count, 1), -np.inf).argmax())
        sample = PhysicalSamples(dataset)[row * len(leads) + k]
        forecast = self.predict(torch.utils.data.default_collate([sample]))[0, t]
        truth = np.where(sample["valid"][t].numpy(), sample["observed"][t].double().numpy(), np.nan)
        # where the target was never observed in training, nothing told the network what is right
        known = dataset.mask & (baselines.filled[t] == 0).any(axis=0)
        variable, start = VARIABLES[names[t]], int(dataset.starts[row])
        return ForecastCase(
            lat2d=source.grid.lat2d,
            lon2d=source.grid.lon2d,
            elevation_m=source.grid.elevation_m,
            truth=variable.display_scale * truth,
            forecast=variable.display_scale * np.where(known, forecast, np.nan),
            wind_ms=source.snapshot(("u", "v"), start) if {"u", "v"} <= set(source.dynamic) else None,
            name=variable.long_name,
            unit=variable.display_unit,
            start=source.times[start],
            lead_hours=leads[k],
        )


def start_and_lead(dataset: ForecastDataset, index: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position of the start in the source's times, and lead time in hours, of sample(s) `index`."""
    leads = np.asarray(dataset.lead_times_hours)
    return dataset.starts[index // len(leads)], leads[index % len(leads)]
